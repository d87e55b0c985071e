"""`braces train` and its rows: packing and splitting change nothing, chats, columns, streams, `--check`, bad input."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from safetensors.torch import load_file

from tests.conftest import tiny_tokenizer
from tests.core.comparison import relative
from tests.core.models.test_chat import CHAT, TEMPLATES

WORDS = ["the", "film", "is", "good", "and", "end", "sad", "old", "town", "happy", "day"]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    """30 rows of very different lengths, with attributes."""
    draw = random.Random(0)
    moods = [("positive", 1.5), ("negative", -1.0), (None, 0)]
    return lines(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "the", "completion": "".join(f" {draw.choice(WORDS)}" for _ in range(draw.randint(1, 25)))}
            | dict(zip(("mood", "how"), moods[number % 3], strict=True))
            for number in range(30)
        ],
    )


def train(braces, model_dir, rows, out, *extra):
    outcome = braces(
        "train", "--model", model_dir, "--data", rows, "--rank", 4, "--lr", 0.02, "--gate-lr", 0.3, "--output-dir", out,
        "--format", "json", *extra,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return outcome.json, load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "fields",
    [(), ("--attribute-field", "mood", "--strength-field", "how", "--contrast", 0)],
    ids=["plain", "attributes"],
)
def test_packing_and_accumulation_give_the_same_adapter(braces, model_dir, rows, tmp_path, fields):
    """Two epochs with a short last batch: the same examples per step, loss and adapter."""
    ways = {
        "packed": ("--batch-size", 8),
        "grouped": ("--batch-size", 8, "--packing", "off"),
        "accumulated": ("--batch-size", 4, "--gradient-accumulation", 2),
    }
    found = {
        name: train(braces, model_dir, rows, tmp_path / name, "--epochs", 2, *options, *fields)
        for name, options in ways.items()
    }
    expected, weights = found["packed"]
    assert (expected["packed"], found["grouped"][0]["packed"]) == (True, False)
    assert expected["steps"] == 8
    assert expected["padding_share"] <= 0.05 < found["grouped"][0]["padding_share"]
    for name in ("grouped", "accumulated"):
        result, others = found[name]
        assert (result["steps"], result["tokens"]) == (8, expected["tokens"])
        assert result["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        for key, tensor in weights.items():
            assert relative(others[key], tensor) < 1e-4, (name, key)


def test_train_from_a_stream(braces, model_dir, rows, tmp_path):
    """Several passes; attributes of unread rows are known."""
    result, weights = train(
        braces, model_dir, rows, tmp_path / "a", "--streaming", "--max-steps", 9, "--batch-size", 8,
        "--attribute-field", "mood",
    )  # fmt: skip
    assert (result["steps"], result["epochs"]) == (9, None)
    assert result["rows"] >= 66  # two passes of four batches, the last of each short, and one more batch
    assert any(name.startswith("condition.") for name in weights)


@pytest.fixture
def chat_model(model_dir, tmp_path):
    folder = tmp_path / "chat-model"
    shutil.copytree(model_dir, folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["prefixes"]
    tokenizer.save_pretrained(folder)
    return folder


def test_train_on_chats(braces, chat_model, tmp_path):
    """The adapter records the chat template, the default for prompts."""
    data = lines(tmp_path / "chats.jsonl", [{"messages": CHAT, "id": n} for n in range(4)])
    result, _ = train(braces, chat_model, data, tmp_path / "out", "--max-steps", 2)
    assert result["rows_dropped"] == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["training"]["chat_template"] is True


def test_check_without_weights(braces, model_dir, rows, tmp_path):
    """Counts, histogram and two examples, as JSON and as text; nothing is written."""
    folder = tmp_path / "no-weights"
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").unlink()
    args = ("train", "--model", folder, "--data", rows, "--eval-data", rows, "--max-length", 20, "--check")
    before = sorted(tmp_path.rglob("*"))
    found = braces(*args, "--attribute-field", "mood", "--format", "json").json
    assert (found["data"]["rows"], found["data"]["attributes"]["neutral"]) == (30, 10)
    assert found["eval_data"]["truncated"] > 0
    outcome = braces(*args)
    assert outcome.code == 0, outcome.err
    assert "[[ film" in outcome.out or "[[ " in outcome.out
    assert "</s>]]" in outcome.out
    assert sorted(tmp_path.rglob("*")) == before


def test_packing_from_a_file(braces, model_dir, tmp_path):
    """YAML `off` is text."""
    (tmp_path / "c.yaml").write_text("packing: off\ncolumns: [text=review]\n")
    outcome = braces("train", "--config", tmp_path / "c.yaml", "--model", model_dir, "--dry-run", "--format", "json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["settings"]["packing"] == "off"
    assert outcome.json["settings"]["columns"] == ["text=review"]


def bad_inputs():
    """(name, options, exit code, part of the message); None removes an option."""
    return [
        ("missing file", {"data": "none.jsonl"}, 3, "no such file"),
        ("empty file", {"data": "empty.jsonl"}, 3, "the file is empty"),
        ("a folder", {"data": "."}, 3, "a folder, not a file"),
        ("unknown kind", {"data": "notes.docx"}, 3, "cannot read `.docx` files"),
        ("wrong keys", {"data": "keys.jsonl"}, 3, "keys.jsonl:1: the row has none of the needed fields"),
        ("mixed keys", {"data": "mixed.jsonl"}, 3, "mixed.jsonl:3: this row is prompt/completion, those before it are"),
        ("two formats", {"data": "both.jsonl"}, 3, "both.jsonl:1: the keys fit 2 formats"),
        ("broken line", {"data": "broken.jsonl"}, 3, "broken.jsonl:2: broken JSON"),
        ("not UTF-8", {"data": "latin.jsonl"}, 3, "latin.jsonl: not UTF-8"),
        ("empty texts", {"data": "blank.jsonl"}, 3, "no row has a token to score (2 read)"),
        ("long prompts", {"data": "pairs.jsonl", "max-length": "4"}, 3, "no row has a token to score"),
        ("a number", {"data": "number.jsonl"}, 3, "number.jsonl:1: `text` must be text, not int"),
        ("unknown column", {"columns": "text=review"}, 3, "no column `review` (keys found: text)"),
        ("columns", {"columns": "prompt=text"}, 2, "prompt is not a complete format"),
        ("attribute column", {"attribute-field": "mood"}, 3, "rows.jsonl:1: the row has no `mood`"),
        ("unknown attribute", {"data": "mood.jsonl", "attribute-field": "mood"}, 3, "unknown attribute `purple`"),
        ("no chat template", {"data": "chats.jsonl"}, 3, "chats.jsonl:1: the tokenizer has no chat template"),
        ("evaluation rows", {"eval-data": "broken.jsonl"}, 3, "broken.jsonl:2"),
        ("hub set", {"data": "someone/nothing:train"}, 3, "hub cannot be reached for the data set"),
        ("hub set, streamed", {"data": "someone/nothing", "streaming": ""}, 3, "hub cannot be reached for the data"),
        ("hub model", {"model": "meta-llama/Llama-2-7b-hf"}, 4, "hub cannot be reached"),
        ("no model", {"model": "./nowhere"}, 4, "no such model folder"),
        ("no config", {"model": "."}, 4, "has no config.json"),
        ("adapter as model", {"model": "{adapter}"}, 4, "this is an adapter, not a model"),
        ("no data", {"data": None}, 2, "--data: missing option"),
        ("rank", {"rank": "33"}, 2, "rank 33 does not fit hidden size 32"),
        ("layers", {"layers": "7"}, 2, "out of range"),
        ("rate", {"lr": "nan"}, 2, "more than 0"),
        ("schedule", {"schedule": "wavy"}, 2, "`wavy` is not one of"),
        ("no number", {"batch-size": "many"}, 2, "--batch-size: `many` is not a whole number"),
        ("device", {"device": "tpu"}, 2, "device `tpu` is not available"),
        ("unknown option", {"rnk": "3"}, 2, "No such option"),
        ("Trainer's option", {"learning-rate": "3"}, 2, "No such option: --learning-rate (here it is --lr)"),
        ("Trainer's key", {"config": "trainer.yaml"}, 2, "unknown key `num_train_epochs`\nUse `epochs`."),
        ("config key", {"config": "typo.yaml"}, 2, "typo.yaml: unknown key `rnak`"),
        ("config file", {"config": "torn.yaml"}, 2, "torn.yaml:2: not YAML"),
        ("stream without an end", {"streaming": "", "max-steps": None}, 2, "no known length"),
        ("opposites of nothing", {"opposites": "a:b"}, 2, "no attributes are trained"),
        ("two columns", {"attribute-field": "a", "columns": "attribute=b"}, 2, "two columns for `attribute`: b and a"),
        ("full folder", {"output-dir": "{adapter}"}, 2, "not empty"),
        ("file as folder", {"output-dir": "notes.txt"}, 2, "the output folder is a file"),
    ]  # fmt: skip


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """A folder of files with one error each, as current folder."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "empty.jsonl").touch()
    (folder / "notes.txt").write_text("hello")
    (folder / "notes.docx").write_text("hello")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text\n')
    (folder / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    (folder / "typo.yaml").write_text("rnak: 4\n")
    (folder / "trainer.yaml").write_text("num_train_epochs: 2\n")
    (folder / "torn.yaml").write_text("rank: 4\n]\n")
    lines(folder / "rows.jsonl", [{"text": "the film is good"}] * 3)
    lines(folder / "keys.jsonl", [{"question": "a", "answer": "b"}])
    lines(folder / "mixed.jsonl", [{"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"}])
    lines(folder / "both.jsonl", [{"text": "a", "prompt": "a", "completion": "b"}])
    lines(folder / "blank.jsonl", [{"text": ""}, {"text": " \n"}])
    lines(folder / "pairs.jsonl", [{"prompt": "the film is good", "completion": " and sad"}])
    lines(folder / "number.jsonl", [{"text": 3}])
    lines(folder / "mood.jsonl", [{"text": "a", "mood": "positive"}, {"text": "a", "mood": "purple"}])
    lines(folder / "chats.jsonl", [{"messages": CHAT}])
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("name", "options", "code", "message"), bad_inputs(), ids=[b[0] for b in bad_inputs()])
def test_bad_input(braces, model_dir, adapter_dir, bad_files, name, options, code, message):
    """Exit code and two lines, as text and as JSON; nothing is written."""
    given = {"model": str(model_dir), "data": "rows.jsonl", "output-dir": "out", "max-steps": "2", **options}
    before = sorted(bad_files.rglob("*"))
    args = [
        part
        for key, value in given.items()
        if value is not None
        for part in [f"--{key}", *([value.format(adapter=adapter_dir)] if value else [])]
    ]
    outcome = braces("train", *args)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert outcome.out == ""
    assert sorted(bad_files.rglob("*")) == before
    assert braces("train", *args, "--format", "json").json["error"]["code"] == code


def test_truncated_rows_are_counted(braces, model_dir, tmp_path):
    data = lines(tmp_path / "long.jsonl", [{"text": "the film is good " * 60_000}, {"text": "a day"}])
    args = ("train", "--model", model_dir, "--data", data, "--max-steps", 1, "--output-dir", tmp_path / "o")
    outcome = braces(*args, "--format", "json")
    assert outcome.code == 0
    assert (outcome.json["rows"], outcome.json["rows_truncated"], outcome.json["rows_dropped"]) == (2, 1, 0)
    assert "1 of 2 rows were cut to 128 tokens" in outcome.err
