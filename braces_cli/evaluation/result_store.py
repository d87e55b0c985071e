"""The output folder of an evaluation: what each system scored on each task, written atomically when the task is done.

run.json                        the settings; `--resume` continues a run of the same settings only
parts/SYSTEM/TASK.json          scores, document by document
samples/SYSTEM/TASK.jsonl       with `--log-samples`: prompt, answer and scores of each document
results.json, results.md        the result, written last
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from braces_cli.core.utils.atomic_files import check_output_folder, finite, remove_partial_files, write_json, write_text
from braces_cli.core.utils.errors import BracesError, ConfigError
from braces_cli.evaluation.scores import Scores, by_task, slug

RESULTS = "results.json"
_RUN = "run.json"
_FORMAT = 1


class Store:
    """The folder of one run; stores nothing where `folder` is None."""

    def __init__(self, folder: Path | None = None, *, log_samples: bool = False) -> None:
        self.folder = folder
        self.log_samples = log_samples

    def begin(self, identity: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """Start or continue a run.

        Args:
            identity: all that the result depends on.
            resume: keep what a run of the same settings has stored.

        Returns:
            The result of a finished run that is resumed, else None.

        Raises:
            ConfigError: the folder holds a run of other settings.
        """
        if self.folder is None:
            return None
        for place in (self.folder, *self.folder.glob("parts/*"), *self.folder.glob("samples/*")):
            remove_partial_files(place)
        wanted = json.loads(json.dumps({"format": _FORMAT, "log_samples": self.log_samples, **identity}))
        if resume and (self.folder / _RUN).is_file():
            stored = _read(self.folder / _RUN)
            other = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
            if other:
                what = f"a run of other settings was begun here ({', '.join(other)})"
                hint = "Give the same settings, another --output-dir, or --overwrite instead of --resume."
                raise ConfigError(what, where=str(self.folder), hint=hint)
            return _read(self.folder / RESULTS) if (self.folder / RESULTS).is_file() else None
        for old in (_RUN, RESULTS, "results.md"):
            (self.folder / old).unlink(missing_ok=True)
        for old in ("parts", "samples"):
            shutil.rmtree(self.folder / old, ignore_errors=True)
        write_json(self.folder / _RUN, wanted)
        return None

    def load(self, system: str, unit: str) -> Scores | None:
        """What is stored of a system's unit, without samples; None where it was not finished."""
        path = self._part(system, unit)
        if path is None or not path.is_file():
            return None
        try:
            return Scores.from_json(_read(path))
        except (KeyError, TypeError, ValueError) as error:
            raise BracesError("cannot be read", where=str(path), hint="Remove the file and resume.") from error

    def save(self, system: str, unit: str, scores: Scores) -> None:
        """Store a finished unit: its samples, and then the scores that say that it is finished."""
        path = self._part(system, unit)
        if path is None or self.folder is None:
            return
        if self.log_samples:
            for task, rows in by_task(scores.samples):
                lines = [json.dumps(finite({"system": system, **row}), ensure_ascii=False) for row in rows]
                write_text(self.folder / "samples" / slug(system) / f"{slug(task)}.jsonl", "\n".join(lines) + "\n")
        # Infinite values are kept as Python writes them: nothing but `load` reads this file.
        write_text(path, json.dumps(scores.to_json()) + "\n")

    def _part(self, system: str, unit: str) -> Path | None:
        return None if self.folder is None else self.folder / "parts" / slug(system) / f"{slug(unit)}.json"


def check_folder(folder: Path | None, *, overwrite: bool, resume: bool, log_samples: bool) -> None:
    """Check the output folder before any work.

    Raises:
        ConfigError: nowhere to store, or a folder that holds something else.
    """
    if folder is None:
        for name, given in (("--resume", resume), ("--log-samples", log_samples)):
            if given:
                raise ConfigError("nowhere to store anything", where=name, hint="Give --output-dir.")
        return
    if (folder / _RUN).is_file():
        hint = "--resume continues the run there; --overwrite starts anew."
        check_output_folder(folder, overwrite or resume, hint)
    else:
        check_output_folder(folder, overwrite or resume)


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BracesError("cannot be read", where=str(path), hint="Remove the file and resume.") from error
    return value
