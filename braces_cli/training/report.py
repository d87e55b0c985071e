"""Results of a run: `metrics.jsonl`, its curve, the size of the side path, the figures and the model card."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from braces_cli.core.adapter.files import AdapterConfig
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.files import file_hint, finite, write_text
from braces_cli.core.models.hub import is_linked, known_license
from braces_cli.core.render import figure, render, save_figure
from braces_cli.core.schema import Count, Kind, Malformed, check, decode
from braces_cli.core.text import escaped, public_command

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
# In this order in each row; values that were not measured at a step are left out.
_KEYS = (
    "step", "epoch", "loss", "lm_loss", "lr", "gate_lr", "grad_norm", "tokens", "tokens_per_second", "eval_loss",
    "eval_perplexity",
)  # fmt: skip


@dataclass
class TrainResult:
    """The keys of `braces train --format json`: times in seconds, memory in bytes, None if not measured.

    Attributes:
        rows: rows read; of a stream, rows read ahead included.
        rows_truncated: rows cut to the maximum length.
        rows_dropped: rows without a scored token.
        packed: several examples in a row.
        seconds: time of the optimizer steps, without evaluations.
        padding_share: padding over computed tokens.
    """

    output_dir: str
    method: str
    trainable_parameters: int
    condition_parameters: int
    total_parameters: int
    trainable_percent: float
    steps: int
    epochs: float | None
    train_loss: float
    base_eval_loss: float | None
    base_eval_perplexity: float | None
    eval_loss: float | None
    eval_perplexity: float | None
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    rows: int
    rows_truncated: int
    rows_dropped: int
    packed: bool
    padding_share: float
    resumed_from: str | None = None


def peak_memory() -> int:
    """Return the largest memory of this process, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Metrics(TypedDict):
    """The values of a row that are read back."""

    step: Count
    loss: NotRequired[float | None]
    lm_loss: NotRequired[float | None]
    eval_loss: NotRequired[float | None]


_ROW = Kind(Metrics, ModelError, "Remove the file.")


class MetricsFile:
    """Append rows to `path`; rows after `step`, from an earlier attempt, are dropped."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self._path = path
        if path.exists():
            write_text(path, "".join(_line(row) for row in read_metrics(path) if row["step"] <= step))

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
    """Rows of the file up to an incomplete line of a killed process; empty if there is no file."""
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
    """Draw `loss.png` from `metrics.jsonl`; return False if there is nothing to draw.

    Args:
        evaluations: loss on the evaluation rows by step, in addition to those in the file.
    """
    rows = read_metrics(folder / METRICS_FILE)
    trained = [row for row in rows if row.get("loss") is not None]
    lines = {"training batches": [row.get("lm_loss", row["loss"]) for row in trained]}
    if trained and "lm_loss" in trained[0]:
        lines = {"training batches, LM loss": lines["training batches"]}
        lines["contrastive loss"] = [row["loss"] - row["lm_loss"] for row in trained]
    measured = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}
    measured |= {step: loss for step, loss in evaluations.items() if loss is not None}
    if not trained and not measured:
        return False
    picture = figure(6, 3.6)
    axes = picture.add_subplot()
    if trained:
        # A line through a single point is invisible.
        style = "o" if len(trained) == 1 else "-"
        for color, (label, losses) in zip(("tab:blue", "tab:green"), lines.items(), strict=False):
            axes.plot([row["step"] for row in trained], losses, style, color=color, linewidth=1, label=label)
    if measured:
        axes.plot(*zip(*sorted(measured.items()), strict=True), "o-", color="tab:orange", label="evaluation rows")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(picture, folder / CURVE_FILE)
    return True


# Name of a metric on the hub, and its key in the result.
_METRICS = {"loss": "eval_loss", "perplexity": "eval_perplexity"}
# The adapter in a checkpoint can be inspected and steered like any other.
CHECKPOINT_CARD = "# LLMBraces adapter in training\n\nA checkpoint of `braces train`; `--resume` continues from it.\n"


def model_card(
    config: AdapterConfig,
    result: dict[str, Any],
    arguments: dict[str, Any],
    command: Sequence[str] = (),
    curve: bool = False,
) -> str:
    """Markdown with a YAML header for the hub.

    Args:
        result: the keys of `TrainResult`.
        arguments: all settings of the run, including the data.
        command: words of the command line.
        curve: `loss.png` is in the folder.
    """
    base = config.base_model_name_or_path
    facts: dict[str, Any] = {
        "title": "LLMBraces adapter" if config.method == "braces" else f"{config.method} adapter",
        "base_model": base if is_linked(base) else None,
        "license": known_license(base),
        "metrics": {name: result[key] for name, key in _METRICS.items() if result.get(key) is not None},
        "command": escaped(shlex.join(public_command(command))),
    }
    facts |= {"config": config, "result": result, "data": arguments, "curve": curve}
    return render("training/adapter_card.md.j2", facts, json=json.dumps)
