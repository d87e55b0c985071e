"""`recipes/ci-pipeline.sh`: exit codes of a job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "braces_cli" / "assets" / "embedded_tasks" / "qa_train.jsonl"


@pytest.mark.slow
def test_exit_codes(tmp_path: Path) -> None:
    """Bad rows: 3. Threshold reached: 0. Not reached: 5; a finished adapter is not trained again."""
    braces, job = tmp_path / "braces", tmp_path / "job"
    braces.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m braces_cli "$@"\n')
    braces.chmod(0o755)
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "MAX_STEPS": "4", "LIMIT": "8"}

    def pipeline(rows: object, threshold: str, code: int) -> None:
        argv = ["bash", ROOT / "recipes" / "ci-pipeline.sh", rows, threshold, job]
        done = subprocess.run(list(map(str, argv)), env=os.environ | more, capture_output=True, text=True)
        assert done.returncode == code, done.stderr

    pipeline("nowhere.jsonl", "embedded_popqa:acc=0", 3)
    pipeline(ROWS, "embedded_popqa:acc=0", 0)
    scores = json.loads((job / "scores" / "results.json").read_text())
    assert scores["systems"][1]["results"]["embedded_popqa"]["acc"]["n"] == 8
    adapter = job / "adapter" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    pipeline(ROWS, "embedded_popqa:acc=1", 5)
    assert adapter.stat().st_mtime_ns == before
