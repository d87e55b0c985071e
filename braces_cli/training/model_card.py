"""The model card that goes with an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from braces_cli.core.method.adapter_files import AdapterConfig

_FIGURES = ("base_eval_perplexity", "eval_perplexity", "base_eval_loss", "eval_loss", "train_loss", "steps", "tokens")
_ROWS = ("rows", "rows_truncated", "rows_dropped")


# Of a checkpoint, whose adapter may be looked at or steered by like any other.
CHECKPOINT_CARD = "# LLMBraces adapter in training\n\nA checkpoint of `braces train`; `--resume` goes on from it.\n"


def model_card(
    config: AdapterConfig,
    result: dict[str, Any],
    asked: dict[str, Any] | None = None,
    command: Sequence[str] = (),
    curve: bool = False,
) -> str:
    """Markdown with a YAML header as the hub reads it.

    Args:
        result: the keys of `TrainResult`.
        asked: settings of the call beyond `config.training`, the data among them.
        command: words of the call.
        curve: whether `loss.png` lies beside the card.
    """
    base = config.base_model_name_or_path
    about = _about(config)
    header = ["---", *about.header]
    # A folder of somebody's disk is no model that the hub could link to.
    if not base.startswith(("/", "~", "embedded@")) and ":" not in base:
        header.append(f"base_model: {base}")
    figures = [
        f"| {name.replace('_', ' ')} | {result[name]:.6g} |" for name in _FIGURES if result.get(name) is not None
    ]
    settings = [f"| {name.replace('_', ' ')} | {value} |" for name, value in config.training.items()]
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# {about.title}, rank {config.r}",
            "",
            f"Base model: `{base}`. {result['trainable_parameters']:,} trained parameters "
            f"({result['trainable_percent']:.3g} % of the base's).",
            "",
            about.what,
            "",
            *about.usage,
            "",
            "## Result",
            "",
            "| | |",
            "|---|---|",
            *figures,
            "",
            *(["![Loss by optimizer step](loss.png)", ""] if curve else []),
            "## Data",
            "",
            "| | |",
            "|---|---|",
            *_data(result, asked or {}),
            "",
            "## Settings",
            "",
            "| | |",
            "|---|---|",
            *settings,
            "",
            *(["## Command", "", f"    {shlex.join(command)}", ""] if command else []),
        ]
    )


@dataclass(frozen=True)
class _About:
    """What a card says of a method: header lines, title, one paragraph, and how to use the adapter."""

    header: tuple[str, ...]
    title: str
    what: str
    usage: tuple[str, ...]


def _about(config: AdapterConfig) -> _About:
    if config.method == "braces":
        return _About(
            ("library_name: braces", "tags: [llmbraces, adapter]"),
            "LLMBraces adapter",
            "It re-weights the FFN sub-updates of the frozen base by their relevance to each token "
            "(LLMBraces, ACL 2025, arXiv 2503.16334).",
            ("    pip install braces-cli", '    braces steer --adapter THIS_FOLDER --prompt "..."'),
        )
    return _About(
        ("library_name: peft", f"tags: [{config.method}, adapter]"),
        f"{config.method} adapter",
        f"A {config.method} baseline that `braces train --method {config.method}` trained through peft; it loads "
        "without braces.",
        (
            "    from peft import PeftModel",
            "    from transformers import AutoModelForCausalLM",
            "",
            f'    base = AutoModelForCausalLM.from_pretrained("{config.base_model_name_or_path}")',
            '    model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ),
    )


def _data(result: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Lines of a table: the sets by name, and what became of their rows."""
    sets = {kind: ", ".join(f"`{name}`" for name in asked.get(kind) or ()) for kind in ("data", "eval_data")}
    counts = {name: f"{result[name]:,}" for name in _ROWS if result.get(name) is not None}
    return [f"| {name.replace('_', ' ')} | {value} |" for name, value in (sets | counts).items() if value]
