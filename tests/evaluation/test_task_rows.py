"""Bad files and names are told from good ones before any model is loaded."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.files import file_hash
from braces_cli.data.rows import read_rows
from braces_cli.evaluation import catalog
from braces_cli.evaluation.catalog import NATIVE_TASKS
from braces_cli.evaluation.run import check_settings
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.task_data import find_files

POPQA = {"question": "What is it?", "possible_answers": '["x"]'}
MC = {"question": "Q?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}}


def _error(kind, *args, **kwargs):
    with pytest.raises(kind) as caught:
        check_settings(EvalSettings(**dict(zip(("tasks", "task_data"), args, strict=False)), **kwargs))
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"), [("truthfulqa_mc3", "truthfulqa_mc1"), ("popqua", "popqa"), ("trivaqa", "triviaqa")]
)
def test_an_unknown_task_is_answered_with_near_misses(name, near):
    message = _error(ConfigError, [name])
    assert f"unknown task `{name}`" in message
    assert near in message


def test_every_name_of_lm_eval_is_known():
    selection, _, _ = check_settings(EvalSettings(tasks=["hellaswag,popqa", "truthfulqa"]))
    assert selection.names == ["hellaswag", "popqa", "truthfulqa_mc1", "truthfulqa_mc2"]


def test_a_group_serves_its_members_and_a_task_of_its_own_file_beats_it(write_jsonl):
    row = {**MC, "mc2_targets": MC["mc1_targets"]}
    both, one = write_jsonl("both.jsonl", [row]), write_jsonl("one.jsonl", [row])
    data = [f"truthfulqa_mc2={one}", f"truthfulqa={both}"]
    _, files, _ = check_settings(EvalSettings(tasks=["truthfulqa"], task_data=data))
    assert files == {"truthfulqa_mc1": both, "truthfulqa_mc2": one}


def test_data_of_a_group_serves_members_asked_for_by_their_own_names(write_jsonl):
    """`--tasks truthfulqa_mc1` takes its rows from `truthfulqa=FILE`."""
    rows = write_jsonl("rows.jsonl", [MC])
    _, files, _ = check_settings(EvalSettings(tasks=["truthfulqa_mc1"], task_data=[f"truthfulqa={rows}"]))
    assert files == {"truthfulqa_mc1": rows}


@pytest.mark.parametrize(("value", "words"), [
    ("popqa", "not NAME=FILE"), ("popqq=x.jsonl", "Did you mean popqa?"), ("triviaqa=x.jsonl", "not among --tasks"),
])  # fmt: skip
def test_task_data_of_a_wrong_form_is_a_wrong_call(value, words):
    assert words in _error(ConfigError, ["popqa"], [value])


def test_perplexity_needs_data():
    assert "--task-data perplexity=FILE" in _error(ConfigError, ["perplexity"])


def test_no_task_at_all_is_a_wrong_call():
    _error(ConfigError, [" , "])


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
def test_a_bad_truthfulqa_row_is_refused_wherever_it_stands(write_jsonl, row, words):
    path = write_jsonl("mc.jsonl", [MC, row])
    message = _error(DataError, ["truthfulqa_mc1"], [f"truthfulqa_mc1={path}"])
    assert words in message
    assert f"{path}:2" in message


def test_triviaqa_needs_aliases(write_jsonl):
    path = write_jsonl("t.jsonl", [{"question": "Q", "answer": {"value": "x"}}])
    assert "needs the field answer.aliases" in _error(DataError, ["triviaqa"], [f"triviaqa={path}"])


def test_all_kinds_of_file_give_the_same_rows(tmp_path):
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


def test_a_folder_holds_the_rows_of_tasks_called_like_its_files(tmp_path):
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
    # What is given by name wins.
    extra = tmp_path / "popqa" / "extra.jsonl"
    _, files, _ = check_settings(EvalSettings(tasks=names, task_data=[f"popqa={extra}"], task_data_dir=tmp_path))
    assert files["popqa"] == extra
    (tmp_path / "triviaqa" / "yours.jsonl").write_text(rows)
    message = _error(DataError, names, task_data_dir=tmp_path)
    assert "which file holds the rows of triviaqa?" in message
    assert "mine.jsonl, yours.jsonl" in message
    assert "no such folder" in _error(ConfigError, names, task_data_dir=tmp_path / "none")


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("arc_easy", {"question": "Q?", "choices": {"text": ["a"]}}, "fields choices.label, answerKey"),
        ("boolq", {"question": "Q?"}, "fields passage, label"),
        ("winogrande", {"sentence": "_ is", "option1": "a"}, "fields option2, answer"),
        ("nq_open", {"question": "Q?"}, "field answer"),
        ("commonsense_gen_piqa", {"input": "", "output": "x"}, "fields instruction, answer"),
    ],
)
def test_missing_fields_are_named(write_jsonl, task, row, words):
    assert words in _error(DataError, [task], [f"{task}={write_jsonl('r.jsonl', [row])}"])


def test_the_generation_tasks_have_no_data_of_their_own():
    assert "--task-data commonsense_gen_boolq=FILE" in _error(ConfigError, ["commonsense_gen"])


def test_known_names_are_found_without_the_whole_catalogue(monkeypatch):
    """lm-eval has thousands of tasks; neither are its files read nor indexed where a name tells the folder."""
    monkeypatch.setattr(catalog, "_scan", lambda names: pytest.fail(f"searched for {names}"))
    monkeypatch.setattr(catalog, "LM_EVAL_FOLDER", catalog.LM_EVAL_FOLDER)
    made = catalog.TaskManager
    monkeypatch.setattr(catalog, "TaskManager", lambda *a, **k: made(*a, **{"include_defaults": _never(k), **k}))
    selection = catalog.select(["zero_shot,commonsense", "commonsense_gen", "mmlu_anatomy,gsm8k"])
    assert len(selection.leaves) == 5 + 8 + 8 + 2


def _never(options):
    assert options.get("include_defaults") is False
    return False


@pytest.mark.parametrize("name", ["x.xlsx", "x"])
def test_other_kinds_are_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(str(tmp_path / name))


def test_texts_are_lines_or_rows(tmp_path, write_jsonl):
    (tmp_path / "t.txt").write_text("one\n\n  \ntwo words\n", encoding="utf-8")
    assert NATIVE_TASKS["perplexity"].read(tmp_path / "t.txt") == ["one", "two words"]
    assert NATIVE_TASKS["perplexity"].read(write_jsonl("t.jsonl", [{"text": "a\nb"}, {"text": ""}])) == ["a\nb"]
    with pytest.raises(DataError, match="no text in `text`"):
        NATIVE_TASKS["perplexity"].read(write_jsonl("u.jsonl", [{"txt": "a"}]))


def test_every_task_file_is_package_data():
    """A wheel without a task's YAML would know the task's name and nothing else."""
    root = Path(__file__).parents[2]
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["braces_cli"]
    package = root / "braces_cli"
    packed = {file for pattern in globs for file in package.glob(pattern)}
    tasks = {
        file for file in (package / "evaluation").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert len(tasks) >= 11
    assert tasks <= packed


@pytest.mark.parametrize("kind", [DataError, ModelError])
def test_a_file_that_cannot_be_hashed_is_an_error_of_its_kind(kind, tmp_path):
    path = tmp_path / "loop"
    path.symlink_to("loop")
    with pytest.raises(kind, match="cannot read"):
        file_hash(path, kind)


@pytest.mark.parametrize("task", ["sentiment", "perplexity", "boolq"])
def test_a_pipe_is_no_file_of_a_task(tmp_path, task):
    """It would be read twice; nobody writes to this one, so that its reader would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="a pipe or a device"):
        find_files(catalog.select([task]), [f"{task}={tmp_path / 'pipe'}"], None)
