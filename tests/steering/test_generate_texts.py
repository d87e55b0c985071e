"""The generation loop: one batch ahead at most, unsteered texts beside steered ones, stop texts."""

from __future__ import annotations

import re

import pytest

from tests.steering.conftest import STEERED


def test_prompts_are_read_as_they_are_needed(session):
    """One batch ahead at most, of however many there are."""
    from itertools import count, islice

    from braces_cli.core.options import Sampling
    from braces_cli.steering.texts import generate_rows, text_requests

    read = []
    endless = (read.append(k) or f"prompt {k}" for k in count())
    rows = generate_rows(session, text_requests(endless, 2), Sampling(2), batch_size=4)
    assert [row["prompt"] for row in islice(rows, 5)] == ["prompt 0"] * 2 + ["prompt 1"] * 2 + ["prompt 2"]
    assert len(read) <= 5


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_twin_is_the_text_without_attribute(steer, adapter_dir, with_adapter):
    """--show-unsteered adds `unsteered` and leaves `text` as it is; at s = 0 the two are one."""
    extra = ["--adapter", adapter_dir] if with_adapter else []
    plain, moved = steer(*extra).lines, steer(*extra, *STEERED).lines
    both = steer(*extra, *STEERED, "--show-unsteered").lines
    assert [row["text"] for row in both] == [row["text"] for row in moved]
    assert [row["unsteered"] for row in both] == [row["text"] for row in plain]
    assert any(row["unsteered"] != row["text"] for row in both)
    zero = steer(*extra, "--attribute", "positive", "--s", 0, "--show-unsteered").lines
    assert all(row["unsteered"] == row["text"] for row in zero)


def test_a_stop_text_ends_texts(steer):
    """Before it, in every row."""
    whole, cut = steer().lines, steer("--stop", "e", "--stop", "a").lines
    assert [row["text"] for row in cut] == [re.split("[ea]", row["text"])[0] for row in whole]
    assert steer("--stop", "").code == 2
