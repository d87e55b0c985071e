"""Prompts from a stream."""

from __future__ import annotations

import io
import os

import pytest

from braces_cli.core.utils.errors import DataError
from braces_cli.steering import prompts
from braces_cli.steering.prompts import read_prompts


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_a_line_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the memory is full; a line that is as long as may be is read."""
    monkeypatch.setattr(prompts, "_LONGEST", 1000)
    with open("/dev/zero", encoding="utf-8") as stream, pytest.raises(DataError, match="a line of more than 1,000"):
        next(read_prompts((), None, stream))
    longest = "x" * 999 + "\n"
    assert list(read_prompts((), None, io.StringIO(f"{longest}\n{longest}"))) == ["x" * 999] * 2
    with pytest.raises(DataError, match="more than") as caught:
        list(read_prompts((), None, io.StringIO(f"a\n{'x' * 1001}\n")))
    assert caught.value.where == "standard input:2"
