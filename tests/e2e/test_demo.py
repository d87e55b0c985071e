"""`braces demo` from end to end: its figures, the commands that it prints, and its page."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from braces_cli.cli.demo import Guide
from braces_cli.cli.main import main

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo."""
    folder = request.config.getoption("--demo") or tmp_path_factory.mktemp("demo") / "out"
    if not folder.exists():
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--output-dir", str(folder), "--quiet"])
        assert ended.value.code == 0
    return folder


@pytest.fixture
def content(demo: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((demo / "demo.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def commands(content: dict[str, Any]) -> list[str]:
    return [step["command"] for step in content["steps"]]


def test_a_short_demo(braces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command with little to do; the merge is verified in a process that cannot import braces."""
    run = Guide.run
    less = {"train": ("--max-steps", "1"), "eval": ("--limit", "2"), "steer": ("--num-samples", "1")}
    shortened = lambda self, title, *argv, **more: run(self, title, *argv, *less.get(argv[0], ()), **more)  # noqa: E731
    monkeypatch.setattr(Guide, "run", shortened)
    outcome = braces("demo", "--output-dir", tmp_path / "demo", "--format", "json")
    assert outcome.code == 0, outcome.err
    assert [step["command"].split()[1] for step in outcome.json["steps"]].count("train") == 3
    assert outcome.json["merge"]["max_logit_difference"] < 1e-4
    assert (tmp_path / "demo" / "index.html").is_file()


@slow
def test_figures(content: dict[str, Any]) -> None:
    base, adapter = ({task["task"]: task["systems"][k]["value"] for task in content["scores"]} for k in (0, 1))
    assert all(adapter[task] >= base[task] + 0.2 for task in base)
    shares = [point["attribute_score"] for point in content["sweep"]["points"]]
    assert shares == sorted(set(shares))
    assert shares[-1] >= shares[0] + 0.4
    assert content["merge"]["max_logit_difference"] < 1e-4
    assert len({text for row in content["texts"] for text in row["texts"].values()}) == 9
    assert len(content["vectors"]) == 8
    names = [system["name"] for system in content["scores"][0]["systems"]]
    assert names == ["base", "adapter", "lora_r4", "lora_r16"]


@slow
def test_commands_are_shown(demo: Path, commands: list[str], braces: Any) -> None:
    """--dry-run and the cards show the commands that ran."""
    outcome = braces("demo", "--dry-run", "--output-dir", demo)
    assert re.findall(r"^   \$ (braces .*)$", outcome.out, re.MULTILINE) == commands
    # Cards have the last part of local paths only.
    assert commands[0].replace(f"{demo}/", "") in (demo / "adapter" / "README.md").read_text(encoding="utf-8")


@slow
def test_page_needs_no_network(demo: Path, commands: list[str], browser: Any) -> None:
    for scheme in ("light", "dark"):
        page = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 800}).new_page()
        events: list[str] = []
        page.on("console", lambda message, events=events: events.append(f"console: {message.text}"))
        page.on("pageerror", lambda error, events=events: events.append(f"error: {error}"))
        page.on("request", lambda request, events=events: events.append(request.url))
        page.goto((demo / "index.html").as_uri())
        assert all(each.startswith(("file:", "data:")) for each in events), events
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
        assert page.evaluate(wide) == 0
        assert page.locator("img.plot").evaluate("image => image.complete && image.naturalWidth > 0")
        assert all(page.get_by_text(command, exact=True).count() == 1 for command in commands)
