"""Local rows of tasks: files are found, and broken rows are refused before any model is loaded."""

from __future__ import annotations

import json
import os

import pytest

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.data.rows import read_rows
from braces_cli.evaluation import catalog
from braces_cli.evaluation.run import check_settings
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.task_data import find_files
from braces_cli.evaluation.task_functions import (
    COMMONSENSE_TASKS,
    commonsense_results,
)

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


@pytest.mark.parametrize(("content", "words"), [
    (None, "no such file"),
    ("", "empty"),
    ("\n\n", "no rows"),
    (json.dumps(POPQA) + "\n{broken\n", "data.jsonl:2: broken JSON"),
    ("[1]\n", "data.jsonl:1: a row must be an object"),
    ('{"question": "x", "answer": "y"}\n', "popqa needs the field possible_answers\nFound: question, answer."),
    (json.dumps({**POPQA, "possible_answers": "x, y"}), "not a JSON list"),
    (json.dumps({**POPQA, "possible_answers": "[]"}), "empty"),
    (json.dumps({**POPQA, "question": None}), "field question"),
])  # fmt: skip
def test_a_bad_popqa_file_is_refused(tmp_path, content, words):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    assert words in _error(DataError, ["popqa"], [f"popqa={path}"])


@pytest.mark.parametrize(("row", "words"), [
    ({"question": "Q?"}, "fields mc1_targets.choices, mc1_targets.labels"),
    ({"question": "Q?", "mc1_targets": {"choices": ["a"]}}, "Found: question, mc1_targets{choices}"),
    ({"question": "Q?", "mc1_targets": {"choices": ["a"], "labels": [1, 0]}}, "1 choices and 2 labels"),
    ({"question": "Q?", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}}, "first choice must be the right"),
])  # fmt: skip
def test_a_bad_truthfulqa_row_is_refused_with_its_line(write_jsonl, row, words):
    path = write_jsonl("mc.jsonl", [MC, row])
    message = _error(DataError, ["truthfulqa_mc1"], [f"truthfulqa_mc1={path}"])
    assert words in message
    assert f"{path}:2" in message


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("arc_easy", {"question": "Q?", "choices": {"text": ["a"]}}, "fields choices.label, answerKey"),
        ("triviaqa", {"question": "Q", "answer": {"value": "x"}}, "needs the field answer.aliases"),
        ("boolq", {"question": "Q?"}, "fields passage, label"),
        ("winogrande", {"sentence": "_ is", "option1": "a"}, "fields option2, answer"),
        ("nq_open", {"question": "Q?"}, "field answer"),
        ("commonsense_gen_piqa", {"input": "", "output": "x"}, "fields instruction, answer"),
    ],
)
def test_missing_fields_are_named(write_jsonl, task, row, words):
    assert words in _error(DataError, [task], [f"{task}={write_jsonl('r.jsonl', [row])}"])


def test_all_formats_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [POPQA, {"question": "NA", "possible_answers": '["None"]'}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d.csv").write_text('question,possible_answers\nWhat is it?,"[""x""]"\nNA,"[""None""]"\n')
    (tmp_path / "e.tsv").write_text('question\tpossible_answers\nWhat is it?\t"[""x""]"\nNA\t"[""None""]"\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    for file in files:
        assert [row.fields for row in read_rows(str(file))] == rows, file.name


@pytest.mark.parametrize("name", ["x.xlsx", "x"])
def test_other_formats_are_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(str(tmp_path / name))


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


@pytest.mark.parametrize("task", ["sentiment", "perplexity", "boolq"])
def test_a_pipe_is_refused(tmp_path, task):
    """The file is read twice, so a reader of a pipe would wait forever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="a pipe or a device"):
        find_files(catalog.select([task]), [f"{task}={tmp_path / 'pipe'}"], None)


FOLDERS = {"social_iqa": "social_i_qa"}


def test_rows_of_llm_adapters_are_accepted(shared):
    data = [
        f"{name}={shared / 'data' / 'commonsense' / FOLDERS.get(name[16:], name[16:])}" for name in COMMONSENSE_TASKS
    ]
    _, files, rows = check_settings(EvalSettings(tasks=["commonsense_gen"], task_data=data))
    assert {file.name for file in files.values()} == {"test.jsonl"}
    for name in COMMONSENSE_TASKS:
        for row in rows[name]:
            assert commonsense_results(row.fields, [row.fields["output"]]) == {"acc": 1, "answered": 1}, row.where
