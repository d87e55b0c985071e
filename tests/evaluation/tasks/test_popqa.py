"""The two PopQA rules on cases written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from braces_cli.evaluation.task_functions import popqa_results, popqa_target

# Written and checked by hand: case, punctuation, substrings, scripts, and how letters are composed.
CASES = [json.loads(line) for line in (Path(__file__).parent / "popqa_aliases.jsonl").read_text("utf-8").splitlines()]


def test_the_file_is_whole():
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["output"].strip() or "nothing")
def test_an_output_scores_as_counted_by_hand(case):
    doc = {"possible_answers": json.dumps(case["answers"])}
    assert popqa_results(doc, [case["output"]]) == {"acc": case["acc"], "acc_word": case["acc_word"]}


def test_a_plain_list_of_answers_is_taken_too():
    assert popqa_target({"possible_answers": ["one", "two"]}) == "one"


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="not a JSON list"):
        popqa_target({"possible_answers": '{"a": 1}'})
