"""Local rows of tasks: files are found, and broken rows are refused before any model is loaded."""

import json

import pytest

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.evaluation.run import check_settings
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.task_functions import COMMONSENSE_TASKS, commonsense_results
from tests.evaluation.conftest import evaluate

POPQA = {"question": "What is it?", "possible_answers": '["x"]'}
MC = {"question": "Q?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}}


def _error(kind, *args, **kwargs):
    with pytest.raises(kind) as caught:
        check_settings(EvalSettings(**dict(zip(("tasks", "task_data"), args, strict=False)), **kwargs))
    return str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "data", "expected"),
    [
        (
            "truthfulqa",
            {"truthfulqa_mc2": "one", "truthfulqa": "both"},
            {"truthfulqa_mc1": "both", "truthfulqa_mc2": "one"},
        ),
        ("truthfulqa_mc1", {"truthfulqa": "both"}, {"truthfulqa_mc1": "both"}),
    ],
)
def test_the_file_of_a_task_takes_precedence_over_that_of_its_group(write_jsonl, tasks, data, expected):
    row = {**MC, "mc2_targets": MC["mc1_targets"]}
    places = {name: write_jsonl(f"{name}.jsonl", [row]) for name in ("both", "one")}
    values = [f"{task}={places[name]}" for task, name in data.items()]
    _, files, _ = check_settings(EvalSettings(tasks=[tasks], task_data=values))
    assert files == {task: places[name] for task, name in expected.items()}


@pytest.mark.parametrize(("value", "words"), [
    ("popqa", "not NAME=FILE"), ("popqq=x.jsonl", "Did you mean popqa?"), ("triviaqa=x.jsonl", "not among --tasks"),
])  # fmt: skip
def test_task_data_of_a_wrong_form_is_refused(value, words):
    assert words in _error(ConfigError, ["popqa"], [value])


@pytest.mark.parametrize(
    ("task", "needed"), [("perplexity", "perplexity"), ("commonsense_gen", "commonsense_gen_boolq")]
)
def test_tasks_without_a_data_set_on_the_hub_need_a_file(task, needed):
    assert f"--task-data {needed}=FILE" in _error(ConfigError, [task])


@pytest.mark.parametrize(("targets", "words"), [
    (None, "mc1_targets"),
    ({"choices": ["a"]}, "labels"),
    ({"choices": ["a"], "labels": [1, 0]}, "other numbers of choices"),
    ({"choices": ["a", "b"], "labels": [0, 1]}, "first choice must be the right"),
])  # fmt: skip
def test_a_bad_truthfulqa_row_is_refused_with_its_line(write_jsonl, targets, words):
    path = write_jsonl("mc.jsonl", [MC, {"question": "Q?", "mc1_targets": targets}])
    message = _error(DataError, ["truthfulqa_mc1"], [f"truthfulqa_mc1={path}"])
    assert words in message
    assert f"{path}:2" in message


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("popqa", {"question": "Q?", "answer": "y"}, "possible_answers"),
        ("popqa", {**POPQA, "possible_answers": "x, y"}, "broken JSON"),
        ("popqa", {**POPQA, "possible_answers": "[]"}, "empty"),
        ("arc_easy", {"question": "Q?", "choices": {"text": ["a"]}}, "label"),
        ("commonsense_gen_piqa", {"input": "", "output": "x"}, "instruction"),
        ("sciq", {"question": "Q?"}, "support"),
    ],
)
def test_rows_that_lm_eval_cannot_read_are_refused_before_a_model_is_loaded(write_jsonl, task, row, words):
    settings = EvalSettings(tasks=[task], task_data=[f"{task}={write_jsonl('r.jsonl', [row])}"])
    with pytest.raises(DataError, match=f"{task} cannot read the row.*{words}"):
        evaluate("/nowhere", [], settings)


def test_lists_and_mappings_in_csv_files_are_json(tmp_path):
    (tmp_path / "mc.csv").write_text('question,mc1_targets\n[x,"{""choices"": [""a""], ""labels"": [1]}"\n')
    _, _, rows = check_settings(
        EvalSettings(tasks=["truthfulqa_mc1"], task_data=[f"truthfulqa_mc1={tmp_path / 'mc.csv'}"])
    )
    assert [row.fields for row in rows["truthfulqa_mc1"]] == [
        {"question": "[x", "mc1_targets": {"choices": ["a"], "labels": [1]}}
    ]


def test_a_folder_has_a_file_or_folder_for_each_task(tmp_path):
    rows = json.dumps(POPQA)
    for name in ("popqa/test.jsonl", "popqa/extra.jsonl", "triviaqa/mine.jsonl", "truthfulqa.jsonl", "other.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(rows)
    (tmp_path / "triviaqa" / "mine.jsonl").write_text(json.dumps({"question": "Q", "answer": {"aliases": ["x"]}}))
    (tmp_path / "truthfulqa.jsonl").write_text(json.dumps(MC))
    names = ["popqa,triviaqa,truthfulqa_mc1,nq_open"]
    _, files, _ = check_settings(EvalSettings(tasks=names, task_data_dir=tmp_path))
    found = {name: str(file.relative_to(tmp_path)) for name, file in files.items()}
    assert found == {
        "truthfulqa_mc1": "truthfulqa.jsonl", "popqa": "popqa/test.jsonl", "triviaqa": "triviaqa/mine.jsonl",
    }  # fmt: skip
    extra = tmp_path / "popqa" / "extra.jsonl"
    _, files, _ = check_settings(EvalSettings(tasks=names, task_data=[f"popqa={extra}"], task_data_dir=tmp_path))
    assert files["popqa"] == extra
    (tmp_path / "triviaqa" / "yours.jsonl").write_text(rows)
    message = _error(DataError, names, task_data_dir=tmp_path)
    assert "which file holds the rows of triviaqa?" in message
    assert "mine.jsonl, yours.jsonl" in message
    assert "no such folder" in _error(ConfigError, names, task_data_dir=tmp_path / "none")
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text(json.dumps([{"instruction": "Q", "answer": "answer1"}]))
    message = _error(ConfigError, ["commonsense_gen_arc_easy,commonsense_gen_social_iqa"], task_data_dir=tmp_path)
    assert "commonsense_gen_social_iqa.jsonl" in message
    assert "social_iqa, social_i_qa." in message


FOLDERS = {"social_iqa": "social_i_qa"}


def test_rows_of_llm_adapters_are_accepted(shared):
    data = [
        f"{name}={shared / 'data' / 'commonsense' / FOLDERS.get(name[16:], name[16:])}" for name in COMMONSENSE_TASKS
    ]
    _, files, rows = check_settings(EvalSettings(tasks=["commonsense_gen"], task_data=data))
    assert {file.name for file in files.values()} == {"test.jsonl"}
    folder = shared / "data" / "commonsense"
    assert check_settings(EvalSettings(tasks=["commonsense_gen"], task_data_dir=folder))[1] == files
    for name in COMMONSENSE_TASKS:
        for row in rows[name]:
            assert commonsense_results(row.fields, [row.fields["output"]]) == {"acc": 1, "answered": 1}, row.where
