"""Every benchmark runs and prints the JSON that others read. Nothing here looks at a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "recipes" / "bench"
TARGETS = {
    "activations": {"saved_vs_law": None},
    "training": {
        "train_step_vs_lora": 0.90,
        "train_step_vs_floor": 1.05,
        "train_memory_vs_lora": 1.0,
        "padding_share": 0.05,
        "attribute_vs_plain": 2.1,
        "packed_vs_padded": 1.3,
    },
    "forward": {
        "attached_vs_bare": 1.02,
        "attached_vs_bare_decode": 1.02,
        "merged_vs_bare": 1.01,
        "merged_vs_bare_decode": 1.01,
    },
    "end_to_end": {
        "train_vs_lora, model, made": None,
        "train_vs_lora, memory, model, made": None,
        "steer_vs_generate": 1.02,
        "steer_vs_generate, memory": None,
    },
    "scaling": {
        f"{name}, {place}": None
        for place in ("how checkpointing", "how packed")
        for name in ("step_vs_lora", "step_vs_floor", "memory_vs_lora")
    },
    "startup": {"help_vs_import": 3.0, "check_vs_tokenizer": 1.5, "dry_run_vs_tokenizer": 1.5},
    "inspection": {
        "map_vs_gemm": 0.70,
        "map_vs_loop": None,
        "map_vs_gemm_bfloat16": 0.70,
        "map_vs_loop_bfloat16": None,
    },
    "evaluation": {"eval_vs_lm_eval": 1.05, "adapters_vs_runs": 1.0},
    "steering": {
        "steered_vs_unsteered": 0.98,
        "steered_vs_unsteered_five": 0.98,
        "steered_vs_control_vector": 1.0,
        "untrained_vs_control_vector": 1.0,
        "mixed_vs_uniform": 1.02,
        "mixed_vs_uniform_untrained": 1.02,
    },
}
# What `evaluation` runs already, with the same programs.
WORDS = {"end_to_end": ("--only", "train", "--only", "steer")}
# The peak of a process can be reset, and so measured, under Linux only.
LINUX_ONLY = {"train_memory_vs_lora", *(name for name in TARGETS["scaling"] if name.startswith("memory"))}


def run(name: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH / f"{name}.py"), *argv], capture_output=True, text=True)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_benchmark_prints_one_document_with_its_ratios(name: str) -> None:
    done = run(name, "--quick", *WORDS.get(name, ()))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == ["machine", "settings", "ratios"]
    expected = set(TARGETS[name]) - (set() if sys.platform == "linux" else LINUX_ONLY)
    assert set(found["ratios"]) == expected
    for ratio_name, ratio in found["ratios"].items():
        assert set(ratio) == {"value", "target", "spread"}
        assert ratio["target"] == TARGETS[name][ratio_name]
        low, high = ratio["spread"]
        # A share of padding may well be none at all.
        assert low > 0 or (low == 0 and ratio_name == "padding_share")
        assert low <= ratio["value"] <= high < math.inf
    assert found["settings"]["quick"] is True
    # A document that people pass on tells nothing about where it was made.
    for private in (str(BENCH.parents[1]), sys.prefix):
        assert private not in done.stdout


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_too_few_repeats_are_refused(name: str) -> None:
    done = run(name, "--repeats", "2")
    assert done.returncode == 2
    assert "--repeats" in done.stderr
