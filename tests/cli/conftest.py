"""Calling the command line inside the test process: exit code, stdout and stderr."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def braces(capsys, monkeypatch):
    """Call `braces ARGS` with the given standard input."""
    from braces_cli.cli.app import main

    def call(*args: Any, stdin: str = "") -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Outcome(caught.value.code, out, err)

    return call
