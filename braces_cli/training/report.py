"""The course of a run: `metrics.jsonl`, one object a log step, and its picture.

The model card that goes with an adapter.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from braces_cli.core.adapter.files import AdapterConfig
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.files import file_hint, finite, write_text
from braces_cli.core.models.hub import card_header
from braces_cli.core.render import figure, save_figure
from braces_cli.core.schema import Count, Kind, Malformed, check, decode
from braces_cli.core.text import escaped, markdown_code, markdown_text, public_command, public_name

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


_FIGURES = ("base_eval_perplexity", "eval_perplexity", "base_eval_loss", "eval_loss", "train_loss", "steps", "tokens")
# Name of a metric on the hub, and its key in the result.
_METRICS = {"loss": "eval_loss", "perplexity": "eval_perplexity"}
_ROWS = ("rows", "rows_truncated", "rows_dropped")


# The adapter in a checkpoint can be inspected and steered like any other.
CHECKPOINT_CARD = "# LLMBraces adapter in training\n\nA checkpoint of `braces train`; `--resume` continues from it.\n"


def model_card(
    config: AdapterConfig,
    result: dict[str, Any],
    arguments: dict[str, Any] | None = None,
    command: Sequence[str] = (),
    curve: bool = False,
) -> str:
    """Markdown with a YAML header that the hub reads.

    Args:
        result: the keys of `TrainResult`.
        arguments: all settings of the run, the data among them.
        command: words of the command line.
        curve: whether `loss.png` lies beside the card.
    """
    about, base = _about(config), public_name(config.base_model_name_or_path)
    arguments = arguments or {}
    figures = {name.replace("_", " "): f"{result[name]:.6g}" for name in _FIGURES if result.get(name) is not None}
    settings = {name.replace("_", " "): markdown_text(_shown(value)) for name, value in config.training.items()}
    return "\n".join(
        [
            _header(config, about, result, arguments),
            "",
            f"# {about.title}, rank {config.r}",
            "",
            f"Base model: {markdown_code(base)}. {result['trainable_parameters']:,} trained parameters "
            f"({result['trainable_percent']:.3g} % of the base's).",
            "",
            about.what,
            "",
            *about.usage,
            "",
            *_section("Result", figures),
            *(["![Loss by optimizer step](loss.png)", ""] if curve else []),
            *_section("Data", _data(result, arguments)),
            *_section("Settings", settings),
            *(["## Command", "", f"    {escaped(shlex.join(public_command(command)))}", ""] if command else []),
        ]
    )


def _shown(value: Any) -> Any:
    return public_name(value) if isinstance(value, str) else value


def _header(config: AdapterConfig, about: _About, result: dict[str, Any], arguments: dict[str, Any]) -> str:
    return card_header(
        config.base_model_name_or_path,
        name=about.title,
        library=about.library,
        relation="adapter",
        tags=about.tags,
        metrics={name: result[key] for name, key in _METRICS.items() if result.get(key) is not None},
        datasets=arguments.get("eval_data") or (),
    )


def _section(title: str, rows: dict[str, str]) -> list[str]:
    """A heading and a table of two columns."""
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


@dataclass(frozen=True)
class _About:
    """The parts of a card that depend on the method; `library` and `tags` are fields of the header."""

    library: str
    tags: tuple[str, ...]
    title: str
    what: str
    usage: tuple[str, ...]


def _about(config: AdapterConfig) -> _About:
    base = json.dumps(public_name(config.base_model_name_or_path))
    if config.method == "braces":
        return _About(
            "braces",
            ("llmbraces", "adapter"),
            "LLMBraces adapter",
            "It re-weights the FFN sub-updates of the frozen base by their relevance to each token "
            "(LLMBraces, ACL 2025, arXiv 2503.16334).",
            ("    pip install braces-cli", '    braces steer --adapter THIS_FOLDER --prompt "..."'),
        )
    return _About(
        "peft",
        (config.method, "adapter"),
        f"{config.method} adapter",
        f"A {config.method} baseline that `braces train --method {config.method}` trained with peft. It loads "
        "without braces.",
        (
            "    from peft import PeftModel",
            "    from transformers import AutoModelForCausalLM",
            "",
            f"    base = AutoModelForCausalLM.from_pretrained({base})",
            '    model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ),
    )


def _data(result: dict[str, Any], arguments: dict[str, Any]) -> dict[str, str]:
    """The data sets by name, and what became of their rows."""
    given = {kind: arguments.get(kind) or () for kind in ("data", "eval_data")}
    sets = {kind: ", ".join(markdown_code(public_name(name)) for name in names) for kind, names in given.items()}
    counts = {name: f"{result[name]:,}" for name in _ROWS if result.get(name) is not None}
    return {name.replace("_", " "): value for name, value in (sets | counts).items() if value}
