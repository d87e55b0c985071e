"""The preference between two answers, by hand and in a sweep."""

from __future__ import annotations

import json
import math

import pytest
import torch

from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import DataError
from braces_cli.evaluation.native_tasks import log_odds, probability, read_answer_pairs

ROWS = [
    {"prompt": "the film is", "positive": " good", "negative": " sad"},
    {"question": "the end?\n (A) a day (B) old\n", "answer_matching_behavior": " (A)",
     "answer_not_matching_behavior": " (B)"},
    {"positive": "a happy day", "negative": "the end"},
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_log_odds_are_those_of_whole_answers(session, file):
    """Also of the published field names, and of texts without a prompt."""
    pairs = read_answer_pairs(str(file))
    assert [pair.prompt for pair in pairs] == ["the film is", ROWS[1]["question"], ""]
    found = log_odds(session, pairs, 2)

    def likelihood(prompt, answer):
        start = max(len(session.base.tokenizer(prompt)["input_ids"]), 1)
        ids = torch.tensor([session.base.tokenizer(prompt + answer)["input_ids"]])
        with torch.no_grad():
            logits = session.base.model(ids).logits[0, :-1].log_softmax(-1)
        return float(logits.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    for pair, odds in zip(pairs, found, strict=True):
        expected = likelihood(pair.prompt, pair.positive) - likelihood(pair.prompt, pair.negative)
        assert odds == pytest.approx(expected, abs=1e-3)
    assert probability(0.0) == 0.5
    assert probability(-1000.0) == 0
    assert probability(2.0) == pytest.approx(math.exp(2) / (1 + math.exp(2)))


def test_a_sweep_measures_the_shift_at_each_strength(braces, model_dir, session, file):
    outcome = braces(
        "steer", "--model", model_dir, "--device", "cpu", "--prompt", "a day", "--prompt", "the end",
        "--max-new-tokens", 4, "--attribute", "positive", "--sweep", "-20,20", "--answers", file,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    pairs = read_answer_pairs(str(file))
    bare = log_odds(session, pairs, 8)
    positive = find_attribute(session, "positive", None)
    for found, s in zip(outcome.json["answers"], (-20.0, 20.0), strict=True):
        with steered(session, [(positive, s)]):
            odds = log_odds(session, pairs, 8)
        moves = [one - other for one, other in zip(odds, bare, strict=True)]
        assert found["s"] == s
        assert found["shift"] == pytest.approx(sum(moves) / 3, abs=1e-4)
        assert found["wrong_way"] == pytest.approx(sum(move * s < 0 for move in moves) / 3)
        assert found["prefers_positive"] == pytest.approx(sum(each > 0 for each in odds) / 3)
        assert found["probability"] == pytest.approx(sum(map(probability, odds)) / 3, abs=1e-5)
        low, high = found["wrong_way_interval"]
        assert low <= found["wrong_way"] <= high
    assert outcome.json["answer_slope"]["slope"] == pytest.approx(
        (outcome.json["answers"][1]["shift"] - outcome.json["answers"][0]["shift"]) / 40, abs=1e-5
    )


@pytest.mark.parametrize("row", [{"prompt": "x", "positive": "a"}, {"positive": "a", "negative": "a"}, {"text": "a"}])
def test_rows_without_two_answers(tmp_path, row):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="no two different answers") as caught:
        read_answer_pairs(str(path))
    assert "answers.jsonl" in str(caught.value.where)
