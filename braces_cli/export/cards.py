"""The model cards of everything that is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core import markdown
from braces_cli.core.models.hub import card_header, is_linked
from braces_cli.core.render import render

_CASES = {
    "a": "The feed-forward layers have additional neurons, and biases that the config switches on.",
    "b": "The base is equivalent to a Llama and is written as one, with biases in its feed-forward layers.",
    "c": "The feed-forward layers have additional neurons, in pairs whose activations cancel up to a linear part.",
}


def card(facts: dict[str, Any]) -> str:
    """README.md of a merged checkpoint.

    Args:
        facts: what `braces merge` prints.
    """
    base = facts["model"]
    title = markdown.text(Path(base).name)
    # The hub's `merge` is a combination of several models; a base with an adapter merged in is a `finetune` there.
    header = card_header(
        base, name=Path(base).name, library="transformers", relation="finetune", tags=("braces", "llmbraces")
    )
    steering = ", ".join(f"{name} at s = {s:g}" for name, s in facts["attributes"].items()) or "none"
    lines = [
        header,
        "",
        f"# {title} with an LLMBraces adapter merged in",
        "",
        "A plain checkpoint: transformers, and every server that supports its architecture, load it without `braces`.",
        _CASES[facts["case"]],
        "",
        f"- base: {markdown.code(markdown.name(base))}",
        f"- adapter: {markdown.code(markdown.name(facts['adapter']))}",
        f"- steering merged in: {markdown.text(steering)}",
        f"- class: `{facts['architecture']}`, {facts['dtype']}",
        f"- neurons added to each layer, padding included: {facts['neurons_added']} (width {facts['width']})",
        "",
        "## Verification",
        "",
        f"Logits of this checkpoint in plain transformers, compared with base and adapter on {facts['probes']} texts:",
        "",
        "| | |",
        "|---|---|",
        f"| largest difference | {facts['max_logit_difference']:.3g} |",
        f"| relative to the largest logit | {facts['relative_difference']:.3g} |",
        f"| effect of rounding each layer's output by one unit in the last place | {facts['rounding']:.3g} |",
        f"| effect of the adapter | {facts['adapter_effect']:.3g} |",
        f"| share of that effect that is missing | {facts['effect_missing']:.3g} |",
        "",
        "`braces merge --check FOLDER` repeats this verification.",
    ]
    return "\n".join(lines) + "\n"


def slots_card(facts: dict[str, Any]) -> str:
    """README.md of a base with slots, from what `braces export slots` prints."""
    return render("export/slots_card.md.j2", facts | _base(facts["model"]))


def lora_card(facts: dict[str, Any]) -> str:
    """README.md of a LoRA folder, from what `braces export lora` prints."""
    strengths = facts["attributes"]
    kind = "adapter" if not strengths else "both" if facts["combined"] else "attribute"
    names = " and ".join(strengths)
    title = "LLMBraces adapter as a LoRA" if kind == "adapter" else f"Attribute {names} as a LoRA"
    if kind == "both":
        title = f"LLMBraces adapter with {names} as one LoRA"
    shown = ", ".join(f"{name} at s = {s:g}" for name, s in strengths.items()) or "none"
    scaled = ", ".join(f"{s:g} for {name}" for name, s in strengths.items() if s != 1)
    # The ranks that vLLM accepts.
    accepted = next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= facts["rank"]), facts["rank"])
    given = {"kind": kind, "title": title, "steering": shown, "strengths": scaled, "vllm_rank": accepted}
    return render("export/lora_card.md.j2", facts | given)


def code_card(facts: dict[str, Any]) -> str:
    """README.md of a checkpoint with its modelling file, from what `braces export code` prints."""
    shown = ", ".join(f"{name} at s = {s:g}" for name, s in facts["attributes"].items()) or "none"
    return render("export/code_card.md.j2", facts | _base(facts["model"]) | {"steering": shown})


def _base(model: str) -> dict[str, str]:
    """The base's short name, and its id where it is one of the hub."""
    return {"name": Path(model).name, "base_model": model if is_linked(model) else ""}
