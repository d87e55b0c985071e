"""The command line on a model of `../shared`: train, eval, steer, inspect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import braces_cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def process(*args):
    """Run `braces ARGS` in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "braces_cli", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_closed_pipe(model_dir):
    """`braces ... | head -1` is not an error."""
    command = f"{sys.executable} -m braces_cli inspect values --model {model_dir} --quiet --format json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["index"] == 0


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """An adapter of stories260K after 60 steps on a part of SST-5, and the result of training."""
    folder = tmp_path_factory.mktemp("stories")
    for name, count in (("train", 1500), ("dev", 200)):
        lines = (shared / "data" / "sst5" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    settings = {"model": shared / "models" / "stories260K", "rank": 16, "max_steps": 60}
    return folder / "out", braces_cli.train(
        folder / "train.jsonl", folder / "out", eval_data=folder / "dev.jsonl", **settings
    )


def test_train(trained):
    """Training halves the perplexity."""
    _, result = trained
    assert result["trainable_parameters"] == 5 * (16 * 64 + 1)
    assert result["rows"] == 1500
    assert result["eval_perplexity"] < 0.5 * result["base_eval_perplexity"]
    assert result["eval_perplexity_without_eos"] < 0.6 * result["base_eval_perplexity_without_eos"]


def test_eval(trained, shared):
    """Four benchmarks and perplexity in one run, and the differences of base and adapter."""
    out, _ = trained
    data = shared / "data"
    files = {
        "truthfulqa": data / "truthfulqa" / "multiple_choice.jsonl",
        "popqa": data / "popqa" / "test.jsonl",
        "triviaqa": data / "triviaqa" / "validation.jsonl",
        "perplexity": data / "sst5" / "dev.jsonl",
    }
    sources = [part for name, file in files.items() for part in ("--task-data", f"{name}={file}")]
    done = process("eval", "--adapter", out, "--tasks", ",".join(files), *sources, "--limit", 6, "--format", "json")
    result = json.loads(done.stdout)
    assert [(s["name"], s["adapter"]) for s in result["systems"]] == [("base", None), ("out", str(out))]
    base, tuned = (system["results"] for system in result["systems"])
    assert set(base) == {"truthfulqa_mc1", "truthfulqa_mc2", "popqa", "triviaqa", "perplexity"}
    assert all(entry["n"] == 6 for metrics in base.values() for entry in metrics.values())
    assert tuned["perplexity"]["token_perplexity"]["value"] < base["perplexity"]["token_perplexity"]["value"]
    compared = {(c["task"], c["metric"]): c for c in result["comparisons"]}
    assert compared["perplexity", "token_perplexity"]["difference"] < 0
    assert 0 < compared["perplexity", "token_perplexity"]["p_value"] <= 1


def test_steer(trained, shared, braces):
    """Ten prompts as JSON Lines: s = 3, -3 and 0; greedy text of one batch equals one by one."""
    out, _ = trained
    lines = (shared / "data" / "sentiment_prompts" / "neutral.jsonl").read_text().splitlines()[:10]
    prompts = "\n".join(lines) + "\n"

    def texts(*args):
        done = braces("steer", "--adapter", out, "--max-new-tokens", 20, *args, stdin=prompts)
        assert done.code == 0, done.err
        return [line["text"] for line in done.lines]

    plain = texts()
    steered = {s: texts("--attribute", "positive", "--s", s) for s in ("3.0", "-3.0", "0")}
    assert {len(rows) for rows in steered.values()} == {10}
    assert steered["0"] == plain
    assert steered["3.0"] != plain != steered["-3.0"] != steered["3.0"]
    greedy = ("--attribute", "positive", "--s", "3.0", "--temperature", 0)
    assert texts(*greedy, "--batch-size", 10) == texts(*greedy, "--batch-size", 1)


def test_inspect(trained, shared):
    """Gates have grown, rows are orthonormal, and value vectors have tokens."""
    out, _ = trained
    found = json.loads(process("inspect", "--adapter", out, "--format", "json").stdout)
    assert all(layer["gate"] > 0.02 and layer["projection_error"] < 1e-5 for layer in found["layers"])
    args = ("inspect", "values", "--model", shared / "models" / "stories260K", "--layers", "4", "--index", "0-2")
    rows = [json.loads(line) for line in process(*args, "--format", "json").stdout.splitlines()]
    assert [len(row["tokens"]) for row in rows] == [10, 10, 10]
