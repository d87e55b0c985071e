"""Stored relevance scales."""

from braces_cli.core.adapter.files import read_config


def test_train_stores_the_scales(train, tmp_path):
    scales = []
    for name in ("auto", "0.5"):
        outcome = train(tmp_path / name, "--max-steps", 2, "--relevance-scale", name)
        assert outcome.code == 0, outcome.err
        scales.append(read_config(tmp_path / name).relevance_scale)
    assert min(scales[0]) > 1
    assert scales[1] == [0.5, 0.5]
