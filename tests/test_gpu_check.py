"""What runs on the day that there is a GPU runs today on the CPU, at tiny shapes."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

GPU = Path(__file__).parents[1] / "recipes" / "gpu"


def test_the_script_runs_the_laws(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    argv = ["bash", GPU / "check.sh", "--device", "cpu", "--part", "tests", "--output", out]
    done = subprocess.run([*map(str, argv), "--work", str(tmp_path)], capture_output=True, text=True)
    found = json.loads(out.read_text())
    assert (done.returncode, found["failed"]) == (0, []), found
    assert "passed" in found["parts"]["tests"]["result"]


def test_every_command_runs(braces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, to spare the start of seven. Benchmarks have tests of their own."""
    monkeypatch.syspath_prepend(str(GPU))
    recipe = importlib.import_module("check")

    def run(argv: list[object]) -> dict[str, Any]:
        assert argv[:2] == ["-m", "braces_cli"]
        outcome = braces(*argv[2:])
        return {"exit_code": outcome.code, "out": outcome.out, "error": outcome.err}

    monkeypatch.setattr(recipe, "run", run)
    out = tmp_path / "check.json"
    argv = ["--device", "cpu", "--part", "commands", "--output", out, "--work", tmp_path]
    monkeypatch.setattr("sys.argv", ["check.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    found = json.loads(out.read_text())
    assert (ended.value.code, found["failed"]) == (0, []), found
    names = {name.partition(", tiny")[0] for name in found["parts"]}
    assert {"train", "train with attributes", "eval", "steer", "merge", "maps"} <= names
    assert json.loads(found["parts"]["train, tiny"]["out"])["steps"] == 2
