"""The model cards of everything that is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.utils.templates import render

_CASES = {
    "a": "The feed-forward layers have new neurons, and biases that its config switches on.",
    "b": "The base computes what a Llama computes, and is written as one, whose feed-forward layers have biases.",
    "c": "The feed-forward layers have new neurons, in pairs whose activations cancel but for the linear part.",
}


def card(facts: dict[str, Any]) -> str:
    """README.md of a merged checkpoint.

    Args:
        facts: what `braces merge` prints.
    """
    base = facts["model"]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- braces"]
    if not Path(base).is_absolute():
        head += [f"base_model: {base}"]
    steering = ", ".join(f"{name} at s = {s:g}" for name, s in facts["attributes"].items()) or "none"
    lines = [
        *head,
        "---",
        "",
        f"# {Path(base).name} with an LLMBraces adapter merged in",
        "",
        "A plain checkpoint: it loads without `braces`, in transformers and in whatever serves its architecture.",
        _CASES[facts["case"]],
        "",
        f"- base: `{base}`",
        f"- adapter: `{facts['adapter']}`",
        f"- steering merged in: {steering}",
        f"- class: `{facts['architecture']}`, {facts['dtype']}",
        f"- new neurons a layer, padding included: {facts['neurons_added']} (width {facts['width']})",
        "",
        "## Proof",
        "",
        f"Logits of this checkpoint, loaded by plain transformers, against the adapter on {facts['probes']} texts:",
        "",
        "| | |",
        "|---|---|",
        f"| largest difference | {facts['max_logit_difference']:.3g} |",
        f"| relative to the largest logit | {facts['relative_difference']:.3g} |",
        f"| what one unit in the last place of each layer's output changes | {facts['rounding']:.3g} |",
        f"| what the adapter changes | {facts['adapter_effect']:.3g} |",
        f"| share of that change that is missing | {facts['effect_missing']:.3g} |",
        "",
        "`braces merge --check FOLDER` proves it once more.",
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
    return {"name": Path(model).name, "base_model": "" if Path(model).is_absolute() else model}
