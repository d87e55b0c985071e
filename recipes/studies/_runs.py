"""What the studies share: runs that are asked for once, each one line of a JSON Lines file, so that a study can stop
and go on."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from braces_cli.core.adapter.model import Session, open_session
from braces_cli.core.models.options import LoadOptions
from braces_cli.data.dataset import Examples, Reading, read_examples
from braces_cli.training.run import run_training
from braces_cli.training.settings import RunSettings


class Runs:
    """The finished runs of a study, by what identifies each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, identity: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run of this identity, done now if it has not been."""
        for run in self.done:
            if all(run.get(key) == value for key, value in identity.items()):
                return run
        run = {**identity, **work()}
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(run) + "\n")
        self.done.append(run)
        print(json.dumps(run), flush=True)
        return run


def read(name: str, tokenizer: Any, max_length: int) -> Examples:
    """Tokenised rows of one file."""
    return read_examples([name], Reading(tokenizer, max_length))


def train(
    model: str, rows: Examples, held_out: Examples | None, settings: RunSettings
) -> tuple[Session, dict[str, Any]]:
    """A fresh base with a freshly trained adapter, still attached, and what `braces train` reports of it."""
    session = open_session(model, None, LoadOptions(device="cpu", dtype="float32"))
    with tempfile.TemporaryDirectory() as folder:
        result = run_training(session, rows, held_out, replace(settings, output_dir=Path(folder)))
    return session, vars(result)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, smallest and largest."""
    found = list(values)
    return {"mean": statistics.fmean(found), "low": min(found), "high": max(found)}
