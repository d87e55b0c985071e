"""`recipes/ci-pipeline.sh`: exit codes of a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "braces_cli" / "assets" / "embedded_tasks" / "qa_train.jsonl"


def pipeline(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the script with the console script on the path."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    braces = commands / "braces"
    braces.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m braces_cli "$@"\n')
    braces.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MAX_STEPS": "4",
        "LIMIT": "8",
    }
    command = ["bash", ROOT / "recipes" / "ci-pipeline.sh", *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_threshold(tmp_path: Path) -> None:
    """Reached: 0. Not reached: 5; a finished adapter is not trained again."""
    passed = pipeline(tmp_path, ROWS, "embedded_popqa:acc=0", tmp_path / "job")
    assert passed.returncode == 0, passed.stderr
    scores = json.loads((tmp_path / "job" / "scores" / "results.json").read_text())
    assert scores["systems"][1]["results"]["embedded_popqa"]["acc"]["n"] == 8
    adapter = tmp_path / "job" / "adapter" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    failed = pipeline(tmp_path, ROWS, "embedded_popqa:acc=1", tmp_path / "job")
    assert failed.returncode == 5, failed.stderr
    assert adapter.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("rows", "threshold", "more", "code"),
    [
        ("nowhere.jsonl", "embedded_popqa:acc=0", (), 3),
        (ROWS, "embedded_popqa:acc=0", ("nowhere",), 4),
        (ROWS, "embedded_popqa", (), 2),
    ],
)
def test_exit_codes(tmp_path: Path, rows: object, threshold: str, more: tuple, code: int) -> None:
    assert pipeline(tmp_path, rows, threshold, tmp_path / "job", *more).returncode == code
