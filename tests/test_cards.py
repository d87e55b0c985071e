"""Model cards and results.md: names are escaped, and cards have no local paths."""

from collections.abc import Callable
from typing import Any

import pytest

from braces_cli.core.adapter.files import AdapterConfig
from braces_cli.evaluation.tables import markdown
from braces_cli.export.run import card
from braces_cli.training.report import model_card
from tests.cli.test_output import controls
from tests.evaluation.conftest import results

LOCAL = "/home/somebody/secret"
NAME = "x](https://evil.example) <script> `a` | b\n# forged \x1b[31m"
FACTS: dict[str, Any] = {
    "model": f"{LOCAL}/{NAME}",
    "adapter": f"{LOCAL}/{NAME}",
    "slots_dir": f"{LOCAL}/{NAME}",
    "attributes": {NAME: 2.0},
    "layers": None,
    "bias": False,
    "combined": False,
    "case": "a",
    "served": True,
    "takes_attributes": True,
    **dict.fromkeys(("architecture", "dtype"), "x"),
    **dict.fromkeys(("neurons_added", "width", "probes", "rank", "parameters", "slots", "first_slot", "slots_used"), 1),
    **dict.fromkeys(
        ("max_logit_difference", "relative_difference", "rounding", "adapter_effect", "effect_missing"), 0.5
    ),
}


def trained(method: str) -> str:
    """The card of a training run."""
    config = AdapterConfig(
        f"{LOCAL}/{NAME}", 4, [0], {}, training={"attributes": f"{LOCAL}/{NAME}", "lr": 0.1}, method=method
    )
    result = {"trainable_parameters": 1, "trainable_percent": 1.0}
    command = ["braces", "train", "--data", f"{LOCAL}/{NAME}", f"--model={LOCAL}/{NAME}"]
    return model_card(config, result, {"data": [f"{LOCAL}/{NAME}"], "eval_data": []}, command)


CARDS: dict[str, Callable[[], str]] = {
    "train": lambda: trained("braces"),
    "train lora": lambda: trained("lora"),
    "merge": lambda: card("merge", FACTS),
    "slots": lambda: card("slots", FACTS),
    "lora": lambda: card("lora", FACTS),
    "code": lambda: card("code", FACTS),
}


@pytest.mark.parametrize("kind", CARDS)
def test_cards_have_no_local_path_and_no_markup_from_names(kind: str) -> None:
    """They have the last part of a path, as text."""
    page = CARDS[kind]()
    body = page.split("---\n", 2)[2]
    assert "somebody" not in page
    assert "forged" in body
    assert not controls(page)
    assert_harmless(body)


def assert_harmless(page: str) -> None:
    """Check that no name became a link, HTML or a heading."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    flat = [child for token in tokens for child in (token, *(token.children or ()))]
    assert not [token for token in flat if token.type in ("html_block", "html_inline")]
    assert not [token for token in flat if token.type == "link_open"]
    headings = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    assert not [heading for heading in headings if heading.startswith("forged")]


def test_results_have_no_markup_from_names() -> None:
    """Of systems, tasks, metrics, models and adapters."""
    entry = {"value": 0.5, "stderr": None, "n": 3}
    below = {"system": NAME, "task": NAME, "metric": NAME, "value": 0.5, "threshold": 0.6, "reached": False}
    page = markdown(results({name: {NAME: {NAME: entry}} for name in ("base", NAME)}, NAME, fail_under=[below]))
    assert page.count("forged") > 8
    assert not controls(page)
    assert_harmless(page)
