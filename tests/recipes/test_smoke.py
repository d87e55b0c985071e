"""One run of each benchmark, study and check in `recipes`, at tiny sizes."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
ENV = os.environ | {"PYTHONPATH": str(RECIPES.parent)}
BENCHMARKS = {
    "activations": {"saved_vs_calculated"},
    "training": {"train_step_vs_lora", "train_step_vs_floor", "padding_share", "packed_vs_padded"},
    "forward": {"attached_vs_bare", "attached_vs_bare_decode", "merged_vs_bare", "merged_vs_bare_decode"},
    "end_to_end": {"train_vs_lora, model, texts", "eval_vs_lm_eval", "adapters_vs_runs", "steer_vs_generate"},
    "scaling": {"step_vs_lora, layers 2", "step_vs_floor, layers 2"},
    "startup": {"help_vs_import", "check_vs_tokenizer", "dry_run_vs_tokenizer"},
    "inspection": {"map_vs_gemm", "map_vs_loop", "map_vs_gemm_bfloat16", "map_vs_loop_bfloat16"},
    "steering": {"steered_vs_unsteered", "steered_vs_control_vector", "mixed_vs_uniform"},
}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmark(name: str) -> None:
    argv = [sys.executable, str(RECIPES / "bench" / f"{name}.py"), "--quick"]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == ["machine", "settings", "ratios"]
    assert found["ratios"].keys() >= BENCHMARKS[name]
    for ratio in found["ratios"].values():
        low, high = ratio["spread"]
        assert 0 <= low <= ratio["value"] <= high
    if name == "activations":
        assert found["ratios"]["saved_vs_calculated"]["value"] == 1
    # The document can be published: it contains no path of this machine.
    assert str(RECIPES.parent) not in done.stdout
    assert sys.prefix not in done.stdout


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a study in this process."""

    def call(name: str, *args: object) -> dict[str, Any]:
        monkeypatch.syspath_prepend(str(RECIPES / "studies"))
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        return runpy.run_path(str(RECIPES / "studies" / f"{name}.py"), run_name="__main__")

    return call


def test_study_of_steering(study: Any, model_dir: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in (("good film", "positive"), ("sad end", "negative"))] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film is"}\n')
    out, plot = tmp_path / "runs.jsonl", tmp_path / "curves.png"
    args = ["--model", model_dir, "--scorer", f"fit:{tmp_path / 'rows.jsonl'}", "--prompts", tmp_path / "prompts.jsonl"]
    methods = ["--method", "braces=0,1", "--method", "pca_diff=1", "--method", "difference=1"]
    study("steering", *args, *methods, "--samples", 1, "--tokens", 2, "--out", out, "--plot", plot)
    assert [json.loads(line)["s"] for line in out.read_text().splitlines()] == [0, 1, 1, 1]
    assert plot.stat().st_size > 1000


def test_gpu_check_on_the_cpu(braces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands, in this process to save time."""
    for folder in ("gpu", "bench"):
        monkeypatch.syspath_prepend(str(RECIPES / folder))
    check = importlib.import_module("check")

    def run(argv: list[Any]) -> dict[str, Any]:
        outcome = braces(*argv[2:])
        return {"exit_code": outcome.code, "out": outcome.out, "error": outcome.err}

    monkeypatch.setattr(check, "run", run)
    out = tmp_path / "check.json"
    argv = ["check.py", "--device", "cpu", "--part", "commands", "--output", out, "--work", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    found = json.loads(out.read_text())
    assert (ended.value.code, found["failed"]) == (0, []), found
    assert json.loads(found["parts"]["train, tiny"]["out"])["steps"] == 2
