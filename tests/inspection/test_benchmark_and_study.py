"""The recipe of this room runs and prints what others read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
# This checkout's package, even where another one is installed.
ENV = os.environ | {"PYTHONPATH": str(RECIPES.parent)}


def test_the_study_measures_concepts(model_dir, tmp_path):
    """On a random model: figures of each concept, beside those of as many draws of random vectors as asked for."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the film is good", "a happy day", "the end")))
    argv = [sys.executable, str(RECIPES / "studies" / "concepts.py"), "--model", str(model_dir)]
    argv += ["--sentences", str(path), "--words", "film,happy", "--draws", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hits"]["vectors"] == 104
    for place in ("rank<=1", "rank<=3"):
        counts = found["hits"][place]
        assert counts["total"]["own"] == sum(word["own"] for word in counts["by_concept"].values())
    assert {row["word"] for row in found["clamps"]} == {"film", "happy"}
    for row in found["clamps"]:
        assert row["chosen_by"] != "expected effect" or [at["times"] for at in row["clamped"]] == [1, 2, 4, 8]
        for at in row["clamped"]:
            assert at["kl"] > 0
            assert abs(at["ratio"] - at["probability"] / row["probability"]) < 1e-5
        if row["chosen_by"] == "rank":
            assert row["rank"] <= 3
        if row["chosen_by"] == "turned, expected effect":
            assert row["rank_turned"] <= 3
        if row["chosen_by"] == "expected effect among all":
            assert row["expected"] > 0
