"""`braces inspect trace` and `braces inspect clamp`, as they are called."""

from __future__ import annotations

import pytest

from tests.cli.test_app import imported_by


@pytest.mark.parametrize("name", ["trace", "clamp"])
def test_help_stays_light(name):
    """No torch for a help page."""
    assert imported_by(f"from braces_cli.cli.main import main; main({['inspect', name, '--help']!r})") == set()


def test_trace_as_json(braces, model_dir, adapter_dir):
    """The keys that others read; every layer and position."""
    args = ["inspect", "trace", "the film is", "--adapter", adapter_dir, "--limit", "3", "--top-k", "2"]
    found = braces(*args, "--format", "json").json
    count = len(found["tokens"])
    assert [(row["layer"], row["position"]) for row in found["layers"]] == [
        (n, i) for n in (0, 1) for i in range(count)
    ]
    for row in found["layers"]:
        assert len(row["sub_updates"]) == 3
        for s in row["sub_updates"]:
            assert {"index", "weight", "relevance", "effect", "tokens"} <= set(s)
            assert all(isinstance(s[k], float) for k in ("weight", "relevance", "gated", "effect", "base_effect"))
            assert len(s["tokens"]) == 2
    assert all(row["base_logit"] is not None for row in found["positions"])
    assert braces(*args).code == 0


def test_trace_of_a_target_at_some_positions(braces, model_dir):
    """Without an adapter relevance is null, not nought."""
    args = ["inspect", "trace", "the film is", "--model", model_dir, "--target", "film", "--positions", "1-2"]
    found = braces(*args, "--layers", "1", "--format", "json").json
    assert [(row["layer"], row["position"]) for row in found["layers"]] == [(1, 1), (1, 2)]
    assert {row["target"]["token"] for row in found["positions"]} == {" film"}
    assert found["layers"][0]["sub_updates"][0]["relevance"] is None


def test_clamp_as_json_and_as_tables(braces, model_dir):
    """Prompts from options or standard input; continuations on request."""
    args = ["inspect", "clamp", "1:3=8", "0:7=-1", "--model", model_dir, "--token", "film"]
    found = braces(*args, "--format", "json", stdin="the film\na day\n").json
    assert found["clamps"] == [{"layer": 1, "index": 3, "value": 8.0}, {"layer": 0, "index": 7, "value": -1.0}]
    assert [row["prompt"] for row in found["prompts"]] == ["the film", "a day"]
    assert found["prompts"][0]["tokens"][0]["token"] == " film"
    assert found["prompts"][0]["kl"] > 0
    more = ["--prompt", "the film", "--generate", "--max-new-tokens", "4"]
    row = braces(*args, *more, "--format", "json").json["prompts"][0]
    assert row["text"] != row["text_before"]
    assert braces(*args, *more).code == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["clamp", "1:3"], 2, "no LAYER:INDEX=VALUE"),
        (["clamp", "1:3=p101", "--prompt", "a", "--data", "b"], 2, "no percentile 101"),
        (["clamp", "1:3=p50", "--prompt", "a"], 2, "--data"),
        (["clamp", "1:3=1", "--prompt", "a", "--data", "b"], 2, "no clamp is a percentile"),
        (["clamp", "1:3=p50", "--prompt", "a", "--data", "nowhere.jsonl"], 3, "no such file"),
        (["clamp", "9:3=1", "--prompt", "a"], 2, "no feed-forward layer 9"),
        (["clamp", "1:52=1", "--prompt", "a"], 2, "no value vector 52"),
        (["clamp", "1:3=1", "--prompt", "a", "--token", "zebra"], 2, "is no token"),
        (["clamp", "1:3=1", "--prompt", "a", "--prompts", "b"], 2, "two sources"),
        (["clamp", "1:3=1", "--prompts", "nowhere.txt"], 3, "no such file"),
        (["clamp", "1:3=1", "--prompt", "a " * 200], 2, "tokens"),
        (["trace", "a", "--target", "zebra"], 2, "is no token"),
        (["trace", "a", "--positions", "9"], 2, "out of range"),
        (["trace", "a", "--layers", "9"], 2, "out of range"),
        (["trace", "a " * 200], 2, "tokens"),
    ],
)
def test_bad_input(braces, model_dir, args, code, message):
    """One or two lines and the right code."""
    outcome = braces("inspect", *args, "--model", model_dir)
    assert outcome.code == code
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
