"""The commonsense tasks that are answered in words."""

from __future__ import annotations

import json

import pytest

from braces_cli.core.options import LoadOptions
from braces_cli.data.rows import Source, detect, parts
from braces_cli.evaluation.results import Store
from braces_cli.evaluation.run import check_settings, run_evaluation
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.task_functions import (
    COMMONSENSE_TASKS,
    commonsense_prompt,
    commonsense_results,
    commonsense_target,
)

FOLDERS = {"social_iqa": "social_i_qa"}


@pytest.mark.parametrize(
    ("output", "answer", "acc", "answered"),
    [
        ("the correct answer is true", "true", 1, 1),
        ("the correct answer is false", "true", 0, 1),
        ("false, or is it true", "true", 0, 1),  # the first counts
        ("solution2", "solution2", 1, 1),
        ("solution 2", "solution2", 0, 0),
        ("answer5 and answer1", "answer1", 0, 1),
        ("ending3.", "ending3", 1, 1),
        ("the correct answer is option1", "option2", 0, 1),
        ("Answer1", "answer1", 0, 0),  # the authors do not fold case
        ("", "option1", 0, 0),
    ],
)
def test_the_first_option_named_is_the_answer(output, answer, acc, answered):
    assert commonsense_results({"answer": answer}, [output]) == {"acc": acc, "answered": answered}


def test_the_prompt_is_what_training_shows():
    row = {"instruction": "Which? option1/option2", "input": "", "output": "the correct answer is option2"}
    assert (commonsense_prompt(row), commonsense_target({**row, "answer": "option2"})) == parts(
        *detect(Source(row, "x:1")), "x:1"
    )


def test_all_eight_run_and_are_averaged(tiny_folder, write_jsonl, tmp_path):
    rows = [{"instruction": f"Is it {i}? true/false", "input": "", "output": "x", "answer": "true"} for i in range(2)]
    file = write_jsonl("rows.jsonl", rows)
    store = Store(tmp_path / "out", log_samples=True)
    settings = EvalSettings(tasks=["commonsense_gen"], task_data=[f"commonsense_gen={file}"])
    result = run_evaluation(str(tiny_folder), [], LoadOptions(device="cpu"), settings, store=store)
    found = result["systems"][0]["results"]
    assert list(found) == [*COMMONSENSE_TASKS, "commonsense_gen"]
    assert found["commonsense_gen"]["braces_average"]["n"] == 16
    sample = json.loads((tmp_path / "out/samples/base/commonsense_gen_piqa.jsonl").read_text().splitlines()[1])
    assert sample["prompt"] == "### Instruction:\nIs it 1? true/false\n\n### Response:\n"


def test_the_collections_own_rows_are_taken(shared):
    data = [
        f"{name}={shared / 'data' / 'commonsense' / FOLDERS.get(name[16:], name[16:])}" for name in COMMONSENSE_TASKS
    ]
    _, files, rows = check_settings(EvalSettings(tasks=["commonsense_gen"], task_data=data))
    assert {file.name for file in files.values()} == {"test.jsonl"}
    for name in COMMONSENSE_TASKS:
        for row in rows[name]:
            assert commonsense_results(row.fields, [row.fields["output"]]) == {"acc": 1, "answered": 1}, row.where
