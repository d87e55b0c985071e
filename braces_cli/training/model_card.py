"""The model card that goes with an adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from braces_cli.core.method.adapter_files import AdapterConfig
from braces_cli.core.models.card_header import card_header
from braces_cli.core.utils import markdown
from braces_cli.core.utils.plain_text import escaped

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
    about, base = _about(config), markdown.name(config.base_model_name_or_path)
    arguments = arguments or {}
    figures = {name.replace("_", " "): f"{result[name]:.6g}" for name in _FIGURES if result.get(name) is not None}
    settings = {name.replace("_", " "): markdown.text(_shown(value)) for name, value in config.training.items()}
    return "\n".join(
        [
            _header(config, about, result, arguments),
            "",
            f"# {about.title}, rank {config.r}",
            "",
            f"Base model: {markdown.code(base)}. {result['trainable_parameters']:,} trained parameters "
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
            *(["## Command", "", f"    {escaped(shlex.join(markdown.words(command)))}", ""] if command else []),
        ]
    )


def _shown(value: Any) -> Any:
    return markdown.name(value) if isinstance(value, str) else value


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
    base = json.dumps(markdown.name(config.base_model_name_or_path))
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
    sets = {kind: ", ".join(markdown.code(markdown.name(name)) for name in names) for kind, names in given.items()}
    counts = {name: f"{result[name]:,}" for name in _ROWS if result.get(name) is not None}
    return {name.replace("_", " "): value for name, value in (sets | counts).items() if value}
