"""The task sets of the embedded model's world."""

from __future__ import annotations

import json
from pathlib import Path

from braces_cli.core.models.load import load_tokenizer
from braces_cli.data.dataset import Reading, read_examples


def rows(embedded: Path, name: str) -> list[dict]:
    lines = (embedded.parent / "embedded_tasks" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_tasks_run_and_the_base_has_something_to_learn(braces) -> None:
    outcome = braces("eval", "--tasks", "embedded", "--limit", 40, "--format", "json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    results = outcome.json["systems"][0]["results"]
    assert results["embedded_popqa"]["acc"]["n"] == 40
    assert results["embedded_popqa"]["acc"]["value"] < 0.6
    assert 0 <= results["embedded_truthful"]["acc"]["value"] < 0.6
    assert "Custom kwargs" not in outcome.err


def test_nothing_that_is_asked_is_trained_on(embedded: Path) -> None:
    asked = {row["question"] for name in ("popqa.jsonl", "truthful.jsonl") for row in rows(embedded, name)}
    trained = [row["prompt"] for row in rows(embedded, "qa_train.jsonl")]
    assert len(asked) > 100
    assert not [prompt for prompt in trained if any(question in prompt for question in asked)]


def test_rows_to_train_on_are_what_train_takes(embedded: Path) -> None:
    folder, tokenizer = embedded.parent / "embedded_tasks", load_tokenizer(str(embedded))
    found = read_examples([str(folder / "qa_train.jsonl")], Reading(tokenizer, 256))
    assert found.rows > 200
    assert found.dropped == found.truncated == 0
    degrees = {(row["attribute"], row["strength"]) for row in rows(embedded, "sentiment_train.jsonl")}
    assert degrees == {
        ("negative", 2.0), ("negative", 1.0), ("neutral", 0.0), ("positive", 1.0), ("positive", 2.0),
    }  # fmt: skip
