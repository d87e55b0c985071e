"""What `braces train` keeps in memory between steps."""

from __future__ import annotations

import pytest

from braces_cli.core.adapter import gram


@pytest.mark.parametrize(("extra", "made"), [([], 2), (["--eval-steps", 2], 4), (["--gradient-checkpointing"], 0)])
def test_products_of_value_matrices_are_made_once_and_not_at_all_where_memory_is_short(
    braces, model_dir, tmp_path, monkeypatch, extra, made
):
    """Once a layer, of which there are two; again after an evaluation in between, which frees them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the film is good"}\n' * 8)
    real, calls = gram._slabs, []
    monkeypatch.setattr(gram, "_slabs", lambda *args: calls.append(1) or real(*args))
    run = braces(
        "train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--max-steps", 4, "--batch-size", 2,
        "--rank", 4, "--output-dir", tmp_path / "out", "--format", "json", *extra,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert len(calls) == made
