"""The model card that goes with an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from braces_cli.core.adapter import AdapterConfig

_FIGURES = ("base_eval_perplexity", "eval_perplexity", "base_eval_loss", "eval_loss", "train_loss", "steps", "tokens")


def model_card(config: AdapterConfig, result: dict[str, Any]) -> str:
    """Markdown with a YAML header as the hub reads it."""
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
            "## Settings",
            "",
            "| | |",
            "|---|---|",
            *settings,
            "",
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
