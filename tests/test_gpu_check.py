"""What runs on the day that there is a GPU runs today on the CPU, at tiny shapes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "recipes" / "gpu" / "check.sh"


def test_the_check_runs_every_command_and_the_laws(tmp_path: Path) -> None:
    """Benchmarks have tests of their own."""
    out = tmp_path / "check.json"
    argv = ["bash", SCRIPT, "--device", "cpu", "--part", "tests", "--part", "commands", "--output", out]
    done = subprocess.run([*map(str, argv), "--work", str(tmp_path)], capture_output=True, text=True)
    found = json.loads(out.read_text())
    assert (done.returncode, found["failed"]) == (0, []), found
    assert "passed" in found["parts"]["tests"]["result"]
    names = {name.partition(", tiny")[0] for name in found["parts"]}
    assert {"train", "train with attributes", "eval", "steer", "merge", "maps"} <= names
    assert found["parts"]["train, tiny"]["result"]["steps"] == 2
