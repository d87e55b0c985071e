"""Results of a study as JSON Lines: each run is measured once, so an interrupted study continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Runs:
    """The finished runs of a study."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, identity: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the run with this identity; measure it with `work` if it is missing."""
        for run in self.done:
            if all(run.get(key) == value for key, value in identity.items()):
                return run
        run = {**identity, **work()}
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(run) + "\n")
        self.done.append(run)
        print(json.dumps(run), flush=True)
        return run
