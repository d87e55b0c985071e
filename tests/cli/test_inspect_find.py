"""`braces inspect values --output` and `braces inspect find`, as they are called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.test_app import imported_by


@pytest.fixture(scope="module")
def map_file(model_dir, tmp_path_factory):
    """A map of the tiny model, made by the command line."""
    path = tmp_path_factory.mktemp("map") / "map.parquet"
    argv = [sys.executable, "-m", "braces_cli", "inspect", "values", "--model", model_dir, "--output", path]
    subprocess.run([*argv, "--top-k", "20"], check=True, capture_output=True)
    return path


@pytest.mark.parametrize("argv", [["values"], ["find"]])
def test_help_stays_light(argv):
    """And so does a search in a map, below."""
    assert imported_by(f"from braces_cli.cli.main import main; main({['inspect', *argv, '--help']!r})") == set()


def test_a_search_in_a_map_imports_no_torch(map_file):
    """That is what keeps it under a second."""
    code = f"from braces_cli.cli.main import main; main(['inspect', 'find', 'film', '--map', {str(map_file)!r}])"
    assert imported_by(code) <= {"msgspec", "numpy"}


def test_a_map_and_the_model_agree(braces, model_dir, tmp_path):
    """`find --map` and `find --model` name the same vectors first."""
    path = tmp_path / "map.parquet"
    made = braces("inspect", "values", "--model", model_dir, "--output", path, "--top-k", 20, "--format", "json")
    assert made.json["vectors"] == 104
    assert made.json["model"] == str(model_dir)
    found = braces("inspect", "find", "film", "--map", path, "--format", "json").lines
    direct = braces("inspect", "find", "film", "--model", model_dir, "--format", "json").lines
    assert found
    count = min(len(found), len(direct))
    assert [(r["layer"], r["index"]) for r in found[:count]] == [(r["layer"], r["index"]) for r in direct[:count]]
    assert {"layer", "index", "rank", "score", "tokens"} == set(found[0])
    assert set(found[0]["tokens"][0]) == {"id", "token", "score"}
    assert braces("inspect", "find", "film", "--map", path, "--model", model_dir).code == 0
    assert braces("inspect", "values", "--model", model_dir, "--output", path).code == 2
    assert braces("inspect", "values", "--model", model_dir, "--output", path, "--overwrite").code == 0


def test_sides(braces, model_dir):
    """Three sides, three answers."""
    args = ["inspect", "values", "--model", model_dir, "--index", "0", "--layers", "0", "--format", "json"]
    rows = [str(braces(*args, "--side", side).lines) for side in ("value", "gate", "up")]
    assert len(set(rows)) == 3


def test_attribute(braces, model_dir, adapter_dir):
    """Most relevant first, with an adapter and without."""
    for more in ([], ["--adapter", adapter_dir]):
        args = ["inspect", "find", "--model", model_dir, *more, "--attribute", "positive", "--format", "json"]
        scores = [row["score"] for row in braces(*args).lines]
        assert len(scores) == 20
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["find"], 2, "give words or --attribute"),
        (["find", "a", "--attribute", "positive"], 2, "give words or --attribute"),
        (["find", "id:96"], 2, "no token 96"),
        (["find", "漢"], 2, "is no token"),
        (["find", "film", "--side", "down"], 2, "`down` is not one of"),
        (["find", "film", "--layers", "2"], 2, "out of range"),
        (["find", "film", "--map", "nowhere.parquet"], 2, "no such map"),
        (["find", "--attribute", "positive", "--map", "m.parquet"], 2, "cannot be found in a map"),
        (["find", "--attribute", "nope"], 2, "unknown attribute"),
        (["values", "--side", "down"], 2, "`down` is not one of"),
        (["values", "--output", "map.txt"], 2, "unknown kind of file"),
        (["values", "--output", "map.jsonl"], 2, "add --format json"),
    ],
)
def test_bad_input(braces, model_dir, args, code, message):
    """One or two lines and the right code."""
    outcome = braces("inspect", *args, "--model", model_dir)
    assert outcome.code == code
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2


def test_a_map_of_another_model_is_refused(braces, map_file, tmp_path):
    """Exit code 4."""
    from tests.conftest import tiny_model, tiny_tokenizer

    tiny_model("llama", max_position_embeddings=128, vocab_size=96, seed=5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    outcome = braces("inspect", "find", "film", "--map", map_file, "--model", tmp_path)
    assert outcome.code == 4
    assert "made for another model" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 2
