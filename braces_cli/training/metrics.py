"""The course of a run: `metrics.jsonl`, one object a log step, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from braces_cli.core.schema import Count, Kind, Malformed, check, decode
from braces_cli.core.utils.atomic_files import file_hint, finite, write_text
from braces_cli.core.utils.errors import BracesError, ModelError
from braces_cli.core.utils.plotting import figure, save_figure

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
# In this order in each row; what was not measured at a step is left out.
_KEYS = (
    "step", "epoch", "loss", "lr", "gate_lr", "grad_norm", "tokens", "tokens_per_second", "eval_loss",
    "eval_perplexity",
)  # fmt: skip


class Metrics(TypedDict):
    """What is read of a row."""

    step: Count
    loss: NotRequired[float | None]
    eval_loss: NotRequired[float | None]


_ROW = Kind(Metrics, ModelError, "Remove the file.")


class MetricsFile:
    """Appends rows to the file.

    Args:
        path: of the file.
        step: that training goes on from; later rows of an earlier attempt are dropped.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self._path = path
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        if rows or path.exists():
            write_text(path, "".join(_line(row) for row in rows))

    def add(self, values: dict[str, Any]) -> None:
        """Write one row; unknown keys are left out."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(_line({key: values[key] for key in _KEYS if key in values}))
        except OSError as error:
            hint = f"{file_hint(error)} Then continue with --resume."
            raise BracesError(f"cannot write: {error.strerror}", where=str(self._path), hint=hint) from error


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of the file, up to a line that a killed process left unfinished; none where there is no file."""
    rows: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = decode(line)
            check(_ROW, row, str(path))
            rows.append(row)
        except (Malformed, ModelError):
            break
    return rows


def draw_curve(folder: Path, evaluations: dict[int, float | None]) -> bool:
    """Draw `loss.png` from `metrics.jsonl`; False where there is nothing to draw.

    Args:
        evaluations: loss on the evaluation rows by step, besides those in the file.
    """
    rows = read_metrics(folder / METRICS_FILE)
    trained = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    measured = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}
    measured |= {step: loss for step, loss in evaluations.items() if loss is not None}
    if not trained and not measured:
        return False
    picture = figure(6, 3.6)
    axes = picture.add_subplot()
    if trained:
        # A line through a single point would not show.
        style = "o" if len(trained) == 1 else "-"
        axes.plot(*zip(*trained, strict=True), style, color="tab:blue", linewidth=1, label="training batches")
    if measured:
        axes.plot(*zip(*sorted(measured.items()), strict=True), "o-", color="tab:orange", label="evaluation rows")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(picture, folder / CURVE_FILE)
    return True
