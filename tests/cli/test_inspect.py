"""`braces inspect` and its subcommands on the command line."""

import json

import pytest

from braces_cli.core.models.ffn import find_ffns
from tests.cli.test_main import imported_by
from tests.conftest import tiny_model, tiny_tokenizer
from tests.core.architectures import tiny


@pytest.fixture
def map_file(braces, model_dir, tmp_path):
    """A map of the tiny model."""
    path = tmp_path / "map.parquet"
    assert braces("inspect", "values", "--model", model_dir, "--output", path, "--top-k", "20").code == 0
    return path


def test_summary_of_an_adapter_needs_no_weights(braces, adapter_dir, model_dir, monkeypatch):
    """Gates, projections and sizes of each layer; the base is that of the adapter's config."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded the weights"))
    found = braces("inspect", "--adapter", adapter_dir, "--format", "json").json
    assert found["model"] == str(model_dir)
    assert found["parameters"] == 2 * (4 * 32 + 1)
    assert found["relevance_to"] == "input"
    for number, layer in enumerate(found["layers"]):
        assert (layer["layer"], layer["value_vectors"], layer["hidden_size"]) == (number, 52, 32)
        assert 0 < layer["gate"] < 1
        assert layer["relevance_scale"] == (1.5, 0.75)[number]
        assert layer["projection_error"] < 1e-5
    assert len(found["layers"]) == 2
    base = braces("inspect", "--model", model_dir, "--format", "json").json
    assert base["adapter"] is base["relevance_to"] is None
    assert {layer["gate"] for layer in base["layers"]} == {None}
    title = braces("inspect", "--adapter", adapter_dir).out.splitlines()
    assert title[0].rstrip().endswith(" parameters")
    assert title[1].startswith("adapter ")


def test_summary_reads_the_revision_of_the_adapters_base(braces, adapter_dir, monkeypatch):
    """Unless another revision is given."""
    from braces_cli.core.adapter import model as sessions

    seen, load = [], sessions.load_shape
    monkeypatch.setattr(sessions, "load_shape", lambda name, **k: seen.append(k["revision"]) or load(name))
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v2"}))
    for args in ((), ("--revision", "v3")):
        assert braces("inspect", "--adapter", adapter_dir, *args, "--format", "json").code == 0
    assert seen == ["v2", "v3"]


def test_values(braces, model_dir):
    """All vectors, or those of layers and indices."""
    args = ["inspect", "values", "--model", model_dir, "--top-k", "5"]
    assert len(braces(*args, "--format", "json").lines) == 2 * 52
    args += ["--layers", "1", "--index", "3,50-"]
    chosen = braces(*args, "--format", "json").lines
    assert [(row["layer"], row["index"]) for row in chosen] == [(1, 3), (1, 50), (1, 51)]
    assert braces(*args).code == 0


def test_search_in_a_map_imports_no_torch(map_file):
    """Only so can a search take less than a second."""
    code = f"from braces_cli.cli.main import main; main(['inspect', 'find', 'film', '--map', {str(map_file)!r}])"
    assert imported_by(code) <= {"msgspec", "numpy"}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_map_and_model_agree(braces, tmp_path, name):
    """`find --map` and `find --model` list the same vectors first."""
    folder, path = tmp_path / name, tmp_path / "map.parquet"
    model = tiny_model(name, vocab_size=96) if name == "llama" else tiny(name)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    args = ["inspect", "values", "--model", folder, "--output", path, "--top-k", "20"]
    written = braces(*args, "--format", "json").json
    assert written["model"] == str(folder)
    assert written["vectors"] == sum(ffn.value_vectors for ffn in find_ffns(model))
    assert braces(*args).code == 2
    assert braces(*args, "--overwrite").code == 0
    found = braces("inspect", "find", "film", "--map", path, "--format", "json").lines
    direct = braces("inspect", "find", "film", "--model", folder, "--format", "json").lines
    assert found
    for row, other in zip(found, direct, strict=False):
        assert set(row) == {"layer", "index", "rank", "score", "tokens"}
        assert [row[key] for key in ("layer", "index", "rank")] == [other[key] for key in ("layer", "index", "rank")]
        assert row["score"] == pytest.approx(other["score"], rel=1e-5)
        assert [(t["id"], t["token"]) for t in row["tokens"]] == [(t["id"], t["token"]) for t in other["tokens"]]
    in_layer = braces("inspect", "find", "film", "--map", path, "--layers", "1", "--format", "json").lines
    assert {row["layer"] for row in in_layer} == {1}
    assert braces("inspect", "find", "film", "--map", path, "--model", folder).code == 0


def test_find_an_attribute(braces, model_dir, adapter_dir):
    """Most relevant first, with and without an adapter."""
    for more in ([], ["--adapter", adapter_dir]):
        args = ["inspect", "find", "--model", model_dir, *more, "--attribute", "positive", "--format", "json"]
        scores = [row["score"] for row in braces(*args).lines]
        assert len(scores) == 20
        assert scores == sorted(scores, reverse=True)


def test_trace(braces, adapter_dir):
    """A row for each layer and position, with relevance and base figures."""
    args = ["inspect", "trace", "the film is", "--adapter", adapter_dir, "--limit", "3", "--top-k", "2"]
    found = braces(*args, "--format", "json").json
    positions = range(len(found["tokens"]))
    assert [(row["layer"], row["position"]) for row in found["layers"]] == [(n, i) for n in (0, 1) for i in positions]
    for row in found["layers"]:
        assert len(row["sub_updates"]) == 3
        assert all(len(update["tokens"]) == 2 and update["relevance"] is not None for update in row["sub_updates"])
    assert all(row["base_logit"] is not None for row in found["positions"])
    assert braces(*args).code == 0


def test_trace_of_a_target(braces, model_dir):
    """At some positions and layers; without an adapter relevance is null."""
    args = ["inspect", "trace", "the film is", "--model", model_dir, "--target", "film", "--positions", "1-2"]
    found = braces(*args, "--layers", "1", "--format", "json").json
    assert [(row["layer"], row["position"]) for row in found["layers"]] == [(1, 1), (1, 2)]
    assert {row["target"]["token"] for row in found["positions"]} == {" film"}
    assert found["layers"][0]["sub_updates"][0]["relevance"] is None


def test_clamp(braces, model_dir):
    """Prompts from options or standard input; continuations with --generate."""
    args = ["inspect", "clamp", "1:3=8", "0:7=-1", "--model", model_dir, "--token", "film"]
    found = braces(*args, "--format", "json", stdin="the film\na day\n").json
    assert found["clamps"] == [{"layer": 1, "index": 3, "value": 8.0}, {"layer": 0, "index": 7, "value": -1.0}]
    assert [row["prompt"] for row in found["prompts"]] == ["the film", "a day"]
    assert found["prompts"][0]["tokens"][0]["token"] == " film"
    assert found["prompts"][0]["kl"] > 0
    args += ["--prompt", "the film", "--generate", "--max-new-tokens", "4"]
    row = braces(*args, "--format", "json").json["prompts"][0]
    assert row["text"] != row["text_before"]
    assert braces(*args).code == 0


def test_clamp_at_a_percentile(braces, model_dir, tmp_path):
    """The value of the percentile is in the JSON and the table, and gives the same result as the number."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the film is good", "the end")))
    args = ["--model", model_dir, "--prompt", "a day"]
    found = braces("inspect", "clamp", "1:3=p90", "0:7=-1", *args, "--data", path, "--format", "json").json
    first, second = found["clamps"]
    assert first["percentile"] == 90.0
    assert second == {"layer": 0, "index": 7, "value": -1.0}
    same = braces("inspect", "clamp", f"1:3={first['value']!r}", "0:7=-1", *args, "--format", "json").json
    assert same["prompts"] == found["prompts"]
    shown = braces("inspect", "clamp", "1:3=p90", *args, "--data", path)
    assert f"{first['value']:.3g}"[:4] in shown.out


def test_report(braces, adapter_dir, tmp_path):
    """Writes the page, and does not overwrite it without --overwrite."""
    path = tmp_path / "report.html"
    args = ["inspect", "report", "--adapter", adapter_dir, "--output", path, "--prompt", "the <b> film"]
    assert braces(*args, "--format", "json").json["bytes"] == path.stat().st_size > 10_000
    assert braces(*args).code == 2
    assert braces(*args, "--overwrite", "--target", "film").code == 0
    assert braces(*args, "--overwrite", "--target", "zebra").code == 2


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["values", "--index", "52"], 2, "out of range"),
        (["values", "--output", "map.jsonl"], 2, "add --format json"),
        (["find"], 2, "either words or --attribute"),
        (["find", "id:96"], 2, "no token 96"),
        (["find", "漢"], 2, "is not a token"),
        (["find", "film", "--layers", "2"], 2, "out of range"),
        (["find", "film", "--map", "nowhere.parquet"], 2, "no such map"),
        (["find", "--attribute", "positive", "--map", "m.parquet"], 2, "cannot be found in a map"),
        (["find", "--attribute", "nope"], 2, "unknown attribute"),
        (["clamp", "1:3"], 2, "not LAYER:INDEX=VALUE"),
        (["clamp", "1:3=p101", "--prompt", "a", "--data", "b"], 2, "not LAYER:INDEX=VALUE"),
        (["clamp", "1:3=p50", "--prompt", "a"], 2, "--data"),
        (["clamp", "1:3=1", "--prompt", "a", "--data", "b"], 2, "need each other"),
        (["clamp", "1:3=p50", "--prompt", "a", "--data", "nowhere.jsonl"], 3, "no such file"),
        (["clamp", "9:3=1", "--prompt", "a"], 2, "no feed-forward layer 9"),
        (["clamp", "0:52=1", "--prompt", "a"], 2, "no value vector 52"),
        (["clamp", "0:1=1", "0:1=2", "--prompt", "a"], 2, "named twice"),
        (["clamp", "1:3=1", "--prompt", "a", "--token", "zebra"], 2, "is not a token"),
        (["clamp", "1:3=1", "--prompt", "a " * 200], 2, "tokens"),
        (["trace", "a", "--positions", "9"], 2, "out of range"),
    ],
)
def test_bad_input(braces, model_dir, args, code, message):
    """One or two lines and the exit code."""
    outcome = braces("inspect", *args, "--model", model_dir)
    assert outcome.code == code
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2


def test_options_before_the_subcommand(braces, model_dir):
    """An error, because they would have no effect."""
    outcome = braces("inspect", "--model", model_dir, "values")
    assert outcome.code == 2
    assert "before the subcommand" in outcome.err
