"""`braces attr-build`: words, texts, descriptions, pairs; pooling; the list; other bases."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.vector import save_attributes
from tests.cli.test_main import imported_by


@pytest.fixture
def build(braces, model_dir, tmp_path):
    def call(name, *args, model=model_dir):
        to = ["--output-dir", tmp_path / "attrs", "--format", "json"]
        return braces("attr-build", "--model", model, "--attribute", name, *args, *to)

    return call


def test_texts_instead_of_words(build, braces, model_dir, tmp_path):
    """Lines and rows give the same attribute; the result has their number."""
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


def test_descriptions_are_recorded(build, braces, model_dir, tmp_path):
    """In the JSON and in the list; the attribute changes texts."""
    args = ["--describe", "happy", "--against", "sad", "--reduction", "mean", "--layers", "1"]
    built = build("mood", *args).json
    expected = {"describe": ["happy"], "against": ["sad"], "reduction": "mean", "pairs": 300}
    assert expected.items() <= built.items()
    assert (built["words"], built["layers"], built["steered_layers"]) == ([], 2, [1])
    assert len(built["separation"]) == 2
    folder = ("--attributes", tmp_path / "attrs")
    listed = braces("attr-build", "--list", *folder, "--format", "json").json["attributes"][0]
    assert (listed["provenance"]["describe"], listed["steered_layers"]) == (["happy"], [1])
    assert "happy / sad" in braces("attr-build", "--list", *folder).out
    steer = ["steer", "--model", model_dir, "--prompt", "the film", *folder, "--temperature", 0]
    texts = [braces(*steer, "--attribute", "mood", "--s", s).lines[0]["text"] for s in (0, 40)]
    assert texts[0] != texts[1]


def test_rows_of_pairs_in_every_form_and_of_several_attributes(build, braces, model_dir, tmp_path):
    """One prompt for both completions is the same as a prompt in each; each attribute of the rows has a file."""
    beside, inside, named = (tmp_path / f"{name}.jsonl" for name in ("beside", "inside", "named"))
    beside.write_text('{"prompt": "the film is", "positive": " good", "negative": " sad"}\n')
    inside.write_text(
        '{"positive": {"prompt": "the film is", "completion": " good"}, '
        '"negative": {"prompt": "the film is", "completion": " sad"}}\n'
    )
    named.write_text(
        '{"attribute": "nice", "prompt": "the film is", "positive": " good", "negative": " sad"}\n'
        '{"attribute": "new", "positive": "a new town", "negative": "an old town"}\n'
    )
    states = [
        load_file(build(path.stem, "--pairs", path).json["path"])[f"{path.stem}.direction"] for path in (beside, inside)
    ]
    assert states[0].equal(states[1])
    to = ["--model", model_dir, "--output-dir", tmp_path / "attrs", "--format", "json"]
    results = braces("attr-build", "--pairs", named, *to).json["attributes"]
    assert [(each["attribute"], each["pairs"]) for each in results] == [("new", 1), ("nice", 1)]
    assert load_file(results[1]["path"])["nice.direction"].equal(states[0])


def test_several_built_in_lists_in_one_command(braces, model_dir, tmp_path):
    """One file per attribute."""
    to = ["--model", model_dir, "--output-dir", tmp_path / "attrs", "--reduction", "mean", "--format", "json"]
    results = braces("attr-build", "--attribute", "angry", "--attribute", "fearful", *to).json["attributes"]
    assert [Path(each["path"]).name for each in results] == ["angry.safetensors", "fearful.safetensors"]
    assert all(Path(each["path"]).is_file() for each in results)


def test_the_list_has_folder_adapter_and_built_in_attributes(build, braces, session, adapter_dir, tmp_path):
    """In the order of the search, with words and base."""
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
    assert calm["base"] == session.base.name
    assert set(calm) == set(built_in)
    assert len(built_in["words"]) == 40
    table = braces("attr-build", "--list", "--attributes", tmp_path / "attrs").out
    assert "quiet, gentle; gradient; last" in table


def test_the_list_needs_no_torch(build, tmp_path, adapter_dir):
    """Only headers are read."""
    build("calm", "--words", "quiet")
    argv = ["attr-build", "--list", "--output-dir", str(tmp_path / "attrs"), "--adapter", str(adapter_dir)]
    assert imported_by(f"from braces_cli.cli.main import main; main({argv!r})") == set()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--words", "a", "--examples", "t.txt"], 2, "two sources"),
        (["--describe", "a", "--words", "b"], 2, "two sources"),
        (["--describe", "a"], 2, "1 descriptions against 0"),
        (["--against", "a"], 2, "0 descriptions against 1"),
        (["--describe", "a", "--against", " "], 2, "a description is blank"),
        (["--words", "a", "--layers", "auto"], 2, "only for pairs"),
        (["--words", "a", "--reduction", "pca"], 2, "only for pairs"),
        (["--words", "a", "--system-prompt", "b"], 2, "only for pairs"),
        (["--words", "a", "--reduction", "median"], 2, "`median` is not one of"),
        (["--words", "a", "--attribute", "b"], 2, "2 names for one attribute"),
        (["--pairs", "same.jsonl"], 3, "both sides are the same"),
        (["--pairs", "half.jsonl"], 3, "no text in `negative`"),
        (["--pairs", "named.jsonl"], 2, "no row of `purple`"),
        (["--examples", "nowhere.txt"], 3, "no such file"),
        (["--examples", "nowhere.jsonl"], 3, "no such file"),
        (["--examples", "empty.txt"], 3, "all texts are blank"),
        (["--pooling", "min"], 2, "`min` is not one of"),
        (["--list", "--attributes", "nowhere"], 2, "no such folder"),
        (["--list", "--attributes", "broken"], 4, "not a file of attributes"),
        ([], 2, "no words for `purple`"),
        (["--words", " ,"], 2, "--words: no words"),
    ],
)
def test_bad_input(braces, model_dir, tmp_path, monkeypatch, args, code, message):
    """Two lines, an exit code, and no output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "same.jsonl").write_text('{"positive": "a", "negative": "a"}\n')
    (tmp_path / "half.jsonl").write_text('{"positive": "a"}\n')
    (tmp_path / "named.jsonl").write_text('{"positive": "a", "negative": "b", "attribute": "red"}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.safetensors").write_bytes(b"not safetensors at all")
    to = [] if "--attributes" in args else ["--output-dir", "out"]
    outcome = braces("attr-build", "--model", model_dir, "--attribute", "purple", *args, *to)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()
