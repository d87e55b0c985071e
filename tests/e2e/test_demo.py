"""`braces demo` from end to end: its figures, the commands that it prints, and its page."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished demo, and its output."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "braces_cli", "demo", "--output-dir", "out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return found


def test_figures(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    found = content(folder)
    base, adapter = ({task["task"]: task["systems"][k]["value"] for task in found["scores"]} for k in (0, 1))
    assert all(adapter[task] >= base[task] + 0.2 for task in base)
    shares = [point["attribute_score"] for point in found["sweep"]["points"]]
    assert shares == sorted(set(shares))
    assert shares[-1] >= shares[0] + 0.4
    assert found["merge"]["max_logit_difference"] < 1e-4
    assert len({text for row in found["texts"] for text in row["texts"].values()}) == 9
    assert len(found["vectors"]) == 8
    systems = ["base", "adapter", *(["lora_r4", "lora_r16"] if find_spec("peft") else [])]
    assert [system["name"] for system in found["scores"][0]["systems"]] == systems


def test_printed_commands_are_valid(demo: tuple[Path, str], braces: Any) -> None:
    """The command line accepts them, and --dry-run and the cards show the same ones."""
    folder, printed = demo
    commands = re.findall(r"^   \$ (braces .*)$", printed, re.MULTILINE)
    assert [step["command"] for step in content(folder)["steps"]] == commands
    outcome: Outcome = braces("demo", "--dry-run", "--output-dir", "out")
    assert re.findall(r"^   \$ (braces .*)$", outcome.out, re.MULTILINE) == commands
    # Cards have the last part of local paths only.
    assert commands[0].replace("out/", "") in (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    for command in commands:
        words = [word for word in shlex.split(command)[1:] if word.startswith("--")]
        names = [word for word in shlex.split(command)[1:3] if not word.startswith("--")]
        listed = braces(*(names if names[0] == "inspect" else names[:1]), "--help").out
        assert all(word in listed for word in words), command


def test_page_needs_no_network(demo: tuple[Path, str], browser: Any) -> None:
    folder, _ = demo
    commands = [step["command"] for step in content(folder)["steps"]]
    for scheme in ("light", "dark"):
        page = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 800}).new_page()
        events: list[str] = []
        page.on("console", lambda message, events=events: events.append(f"console: {message.text}"))
        page.on("pageerror", lambda error, events=events: events.append(f"error: {error}"))
        page.on("request", lambda request, events=events: events.append(request.url))
        page.goto((folder / "index.html").as_uri())
        assert all(each.startswith(("file:", "data:")) for each in events), events
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
        assert page.evaluate(wide) == 0
        assert page.locator("img.plot").evaluate("image => image.complete && image.naturalWidth > 0")
        assert all(page.get_by_text(command, exact=True).count() == 1 for command in commands)


def test_folder_that_is_not_empty(braces: Any, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other")
    outcome = braces("demo", "--output-dir", tmp_path)
    assert outcome.code == 2
    assert "not empty" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
