"""`braces attr-build`: words or texts, pooling, the list of what there is, portability."""

from __future__ import annotations

import shutil

import pytest

from tests.cli.test_app import imported_by
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.fixture
def build(braces, model_dir, tmp_path):
    def call(name, *args, model=model_dir):
        to = ["--output-dir", tmp_path / "attrs", "--format", "json"]
        return braces("attr-build", "--model", model, "--attribute", name, *args, *to)

    return call


def test_texts_in_place_of_words(build, braces, model_dir, tmp_path):
    """Plain lines and rows give the same; the file says how many, and steering takes it."""
    plain, rows = tmp_path / "t.txt", tmp_path / "t.jsonl"
    plain.write_text("the film is good\n\na happy day\n")
    rows.write_text('{"text": "the film is good"}\n{"text": "a happy day"}\n')
    one, two = build("lines", "--examples", plain).json, build("rows", "--examples", rows).json
    assert (one["words"], one["examples"], one["pooling"]) == ([], 2, "mean")
    texts = []
    for built in (one, two):
        attribute = ["--attribute", built["attribute"], "--attributes", tmp_path / "attrs", "--s", 30]
        outcome = braces("steer", "--model", model_dir, "--prompt", "the film", *attribute)
        texts.append(outcome.lines[0]["text"])
    assert texts[0] == texts[1]


def test_pooling_is_stored_and_changes_the_state(build, tmp_path):
    """`mean` unless asked otherwise; an attribute read back knows."""
    from safetensors.torch import load_file

    states = {}
    for pooling in ("mean", "last", "max"):
        path = build(pooling, "--words", "extraordinary", "--pooling", pooling).json["path"]
        states[pooling] = load_file(path)[f"{pooling}.hidden"]
    assert not states["mean"].equal(states["last"])
    assert not states["last"].equal(states["max"])


def test_the_list_shows_folder_adapter_and_built_in(build, braces, session, adapter_dir, tmp_path):
    """In the order of looking, with words, base, fingerprint and statistics."""
    from braces_cli.core.attributes.attribute import build_attribute, save_attributes

    build("calm", "--words", "quiet,gentle", "--pooling", "last")
    trained = [build_attribute(session, name, [name]) for name in ("good", "sad")]
    save_attributes(adapter_dir / "attributes.safetensors", trained)
    outcome = braces(
        "attr-build", "--list", "--attributes", tmp_path / "attrs", "--adapter", adapter_dir, "--format", "json"
    )
    rows = outcome.json["attributes"]
    assert [(row["name"], row["source"]) for row in rows[:4]] == [
        ("calm", "folder"), ("good", "adapter"), ("sad", "adapter"), ("angry", "built-in"),
    ]  # fmt: skip
    calm, built_in = rows[0], rows[3]
    assert calm["words"] == ["quiet", "gentle"]
    assert (calm["layers"], calm["hidden_size"], calm["pooling"], calm["examples"]) == (2, 32, "last", 0)
    assert calm["fingerprint"] == session.base.fingerprint(session.ffns)
    assert calm["base"] == session.base.name
    assert len(calm["statistics"]["difference"]) == len(calm["statistics"]["residual"]) == 2
    assert all(value > 0 for values in calm["statistics"].values() for value in values)
    assert set(calm) == set(built_in)
    assert len(built_in["words"]) == 40
    table = braces("attr-build", "--list", "--attributes", tmp_path / "attrs").out
    assert "quiet, gentle" in table


def test_the_list_needs_no_torch(build, tmp_path, adapter_dir):
    """It reads headers only."""
    build("calm", "--words", "quiet")
    argv = ["attr-build", "--list", "--output-dir", str(tmp_path / "attrs"), "--adapter", str(adapter_dir)]
    assert imported_by(f"from braces_cli.cli.app import main; main({argv!r})") == set()


def test_a_file_fits_the_same_base_elsewhere_and_in_another_dtype(build, braces, model_dir, tmp_path):
    """Portable: the folder of the base and its dtype do not matter."""
    build("calm", "--words", "quiet,gentle")
    moved = tmp_path / "moved"
    shutil.copytree(model_dir, moved)
    attribute = ["--attribute", "calm", "--attributes", tmp_path / "attrs", "--prompt", "a"]
    assert braces("steer", "--model", moved, "--dtype", "bfloat16", *attribute).code == 0


def test_another_base_is_refused_by_name(build, braces, model_dir, tmp_path):
    """Exit code 4, what differs, and which base the file belongs to."""
    build("calm", "--words", "quiet,gentle")
    other = tmp_path / "other"
    tiny_model("llama", hidden_size=16).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    outcome = braces(
        "steer", "--model", other, "--attribute", "calm", "--attributes", tmp_path / "attrs", "--prompt", "a"
    )
    assert outcome.code == 4
    assert "another base (hidden size: attribute 32, base 16)" in outcome.err
    assert str(model_dir) in outcome.err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--words", "a", "--examples", "t.txt"], 2, "two sources"),
        (["--examples", "nowhere.txt"], 3, "no such file"),
        (["--examples", "nowhere.jsonl"], 3, "no such file"),
        (["--examples", "empty.txt"], 3, "no text but blanks"),
        (["--pooling", "min"], 2, "no pooling `min`"),
        (["--list", "--attributes", "nowhere"], 2, "no such folder"),
        (["--list", "--attributes", "broken"], 4, "not an attribute file"),
        ([], 2, "no words for `purple`"),
    ],
)
def test_bad_input(braces, model_dir, tmp_path, monkeypatch, args, code, message):
    """Two lines, the right code, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.safetensors").write_bytes(b"not safetensors at all")
    to = [] if "--attributes" in args else ["--output-dir", "out"]
    outcome = braces("attr-build", "--model", model_dir, "--attribute", "purple", *args, *to)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()
