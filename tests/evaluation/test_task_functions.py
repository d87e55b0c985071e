"""Scores of generated answers, on cases written and checked by hand; rows of the embedded model's world."""

import json
from pathlib import Path

import pytest

from braces_cli.data.rows import Source, parts, read_format
from braces_cli.evaluation import task_functions

# Case, punctuation, substrings, scripts, and composition of letters.
CASES = [json.loads(line) for line in (Path(__file__).parent / "popqa_aliases.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["output"].strip() or "nothing")
def test_popqa_scores_equal_those_by_hand(case):
    doc = {"possible_answers": json.dumps(case["answers"])}
    assert task_functions.popqa_results(doc, [case["output"]]) == {"acc": case["acc"], "acc_word": case["acc_word"]}


def test_possible_answers_are_a_list_or_its_json():
    assert task_functions.popqa_target({"possible_answers": ["one", "two"]}) == "one"
    with pytest.raises(ValueError, match="not a JSON list"):
        task_functions.popqa_target({"possible_answers": '{"a": 1}'})


@pytest.mark.parametrize(
    ("output", "answer", "acc", "answered"),
    [
        ("the correct answer is true", "true", 1, 1),
        ("the correct answer is false", "true", 0, 1),
        ("false, or is it true", "true", 0, 1),
        ("solution2", "solution2", 1, 1),
        ("solution 2", "solution2", 0, 0),
        ("answer5 and answer1", "answer1", 0, 1),
        ("ending3.", "ending3", 1, 1),
        ("the correct answer is option1", "option2", 0, 1),
        ("Answer1", "answer1", 0, 0),  # the authors' rule depends on case
        ("", "option1", 0, 0),
    ],
)
def test_the_first_option_named_is_the_answer(output, answer, acc, answered):
    assert task_functions.commonsense_results({"answer": answer}, [output]) == {"acc": acc, "answered": answered}


@pytest.mark.parametrize(
    ("instruction", "answer", "count"),
    [("Is it? Answer format: true/false", "false", 2), ("Is it?", "true", 2),
     ("Answer1: a Answer2: b Answer3: c Answer format: answer1/answer2/answer3", "answer2", 3)],
)  # fmt: skip
def test_chance_is_over_the_labels_that_a_row_offers(instruction, answer, count):
    assert len(task_functions.commonsense_labels({"instruction": instruction, "answer": answer})) == count


def test_prompt_and_target_equal_those_of_training():
    row = {"instruction": "Which? option1/option2", "input": "", "output": "the correct answer is option2"}
    found = task_functions.commonsense_prompt(row), task_functions.commonsense_target({**row, "answer": "option2"})
    assert found == parts(*read_format(Source(row, "x:1"), {}), "x:1")


def _embedded_rows(embedded: Path, name: str) -> list[dict]:
    lines = (embedded.parent / "embedded_tasks" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_questions_are_not_in_the_training_rows(embedded: Path) -> None:
    asked = {row["question"] for name in ("popqa.jsonl", "truthful.jsonl") for row in _embedded_rows(embedded, name)}
    trained = [row["prompt"] for row in _embedded_rows(embedded, "qa_train.jsonl")]
    assert len(asked) > 100
    assert not [prompt for prompt in trained if any(question in prompt for question in asked)]
