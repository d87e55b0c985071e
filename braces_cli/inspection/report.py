"""One self-contained page about a model and its adapter: what is on it, and the HTML.

Everything a model or a user wrote (tokens, names, settings) reaches the page escaped: tokens in HTML by the template's
autoescaping, tokens for the script inside JSON without `<`, and the script itself only ever sets `textContent`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli import __version__
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ModelError
from braces_cli.core.progress import Report, silent
from braces_cli.core.render import render_page
from braces_cli.inspection.clamp import prompt_ids
from braces_cli.inspection.search import attribute_relevance, relevance_module, relevance_scores
from braces_cli.inspection.trace import record_activations, trace
from braces_cli.inspection.vocabulary import LogitLens, TokenTexts, plain_ffns

DEFAULT_PROMPT = "When I opened the door, I saw"
_AMPLIFIED = 24
_TOKENS = 8
_SUB_UPDATES = 5
# Shown for an adapter that was trained without attributes; of one with, its own are.
_ATTRIBUTES = ["positive", "negative"]


def report_data(
    session: Session, prompt: str = DEFAULT_PROMPT, target: int | None = None, report: Report = silent
) -> dict[str, Any]:
    """What the page shows: `{model, adapter, rank, gates, amplified, heat, attributes, training, figures, ...}`.

    Raises:
        ConfigError: a prompt that does not fit the model.
    """
    report("report", 0, 4)
    heat = _heat(session, prompt, target)
    report("report", 1, 4)
    amplified = _amplified(session, prompt)
    report("report", 2, 4)
    config = session.config
    names = (config.attributes if config is not None else []) or _ATTRIBUTES
    for_steering = session.adapter is None  # relevance through an adapter is that to p
    attributes = [_alignment(session, find_attribute(session, name, None, for_steering=for_steering)) for name in names]
    report("report", 4, 4)
    return {
        "version": __version__,
        "model": _name(session.base.name),
        "adapter": None if session.folder is None else session.folder.name,
        "rank": None if config is None else config.r,
        "layers": len(plain_ffns(session.ffns)),
        "value_vectors": sum(ffn.value_vectors for ffn in plain_ffns(session.ffns)),
        "hidden_size": plain_ffns(session.ffns)[0].hidden_size,
        "gates": _gates(session),
        "amplified": amplified,
        "heat": heat,
        "attributes": attributes,
        "training": {} if config is None else {k: v for k, v in config.training.items() if v is not None},
        "figures": {} if session.folder is None else _figures(session.folder),
    }


def _name(model: str) -> str:
    """A hub id as it is; of a folder its last part, for a page that is passed on need not tell where it was made."""
    return Path(model).name if Path(model).is_dir() else model


def _gates(session: Session) -> list[dict[str, Any]]:
    if session.adapter is None:
        return []
    return [
        {"layer": ffn.layer, "gate": float(adapter_layer.g.detach())}
        for ffn, adapter_layer in session.adapter.adapted_ffns
    ]


def _amplified(session: Session, prompt: str) -> list[dict[str, Any]]:
    """Value vectors by the mean over the prompt of |g r_ij| |v_j|, or of |w_ij| |v_j| where there is no adapter."""
    run = record_activations(session, prompt_ids(session, prompt))
    lens, texts = LogitLens(session.base.model), TokenTexts(session.base.tokenizer)
    rows = []
    for ffn in plain_ffns(session.ffns):
        module = relevance_module(session, ffn)
        if session.adapter is not None and module is None:
            continue
        values, weights = ffn.value_matrix().detach().to(run.last.device), run.weights[ffn.layer]
        change = weights if module is None else relevance_scores(module, run.inputs[ffn.layer], values)[1]
        strength = change.abs().mean(dim=0) * values.float().norm(dim=0)
        best = strength.topk(min(_AMPLIFIED, len(strength)))
        for size, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row = {"layer": ffn.layer, "index": index, "strength": size, "vector": values[:, index]}
            rows.append(row | {"weight": float(weights[:, index].mean()), "change": float(change[:, index].mean())})
    rows.sort(key=lambda row: -row["strength"])
    rows = rows[:_AMPLIFIED]
    ids = lens.best(torch.stack([row.pop("vector") for row in rows]), _TOKENS)[1]
    return [row | {"tokens": [texts[t] for t in tokens]} for row, tokens in zip(rows, ids.tolist(), strict=True)]


def _heat(session: Session, prompt: str, target: int | None) -> dict[str, Any]:
    """`{prompt, tokens, targets, layers: [{layer, cells: [{effect, sub_updates}]}], largest}`, or `{prompt, reason}`
    where the architecture has no direct effects."""
    prompt_ids(session, prompt)  # a prompt that does not fit is the user's error, not the architecture's
    try:
        found = trace(session, prompt, target=target, top=_SUB_UPDATES, top_k=_SUB_UPDATES)
    except ModelError as error:
        return {"prompt": prompt, "reason": error.message}
    count = len(found["tokens"])
    rows = [found["layers"][start : start + count] for start in range(0, len(found["layers"]), count)]
    layers = [{"layer": row[0]["layer"], "cells": [_cell(cell) for cell in row]} for row in rows]
    largest = max(abs(cell["effect"]) for row in layers for cell in row["cells"])
    return {
        "prompt": prompt,
        "tokens": found["tokens"],
        "targets": [row["target"]["token"] for row in found["positions"]],
        "layers": layers,
        "largest": largest or 1.0,
        "asked": target is not None,
    }


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    subs = [
        {k: s[k] for k in ("index", "weight", "gated", "effect", "base_effect")}
        | {"tokens": [visible(t["token"]) for t in s["tokens"]]}
        for s in cell["sub_updates"]
    ]
    return {"effect": cell["effect"], "sub_updates": subs}


def _alignment(session: Session, attribute: Attribute) -> dict[str, Any]:
    """How much of an attribute's state each layer's projection sees, |R p| / |p| (a random subspace of rank r sees
    about sqrt(r / d)), and the tokens that pushing along the attribute promotes there."""
    lens, texts = LogitLens(session.base.model), TokenTexts(session.base.tokenizer)
    adapter_layers = (
        {ffn.layer: adapter_layer for ffn, adapter_layer in session.adapter.adapted_ffns} if session.adapter else {}
    )
    rows = []
    for row, ffn in enumerate(plain_ffns(session.ffns)):
        state = attribute.state[row]
        share, chance = None, None
        if ffn.layer in adapter_layers:
            projection: Tensor = adapter_layers[ffn.layer].projection().detach().float().cpu()
            share = float((projection @ state).norm() / state.norm().clamp(min=1e-30))
            chance = math.sqrt(len(projection) / len(state))
        weights = attribute_relevance(session, attribute, ffn)
        tokens = []
        if weights is not None:
            for_steering = ffn.value_matrix().detach() @ weights.to(ffn.value_matrix().dtype)
            tokens = [texts[t] for t in lens.best(for_steering[None], _TOKENS)[1][0].tolist()]
        rows.append({"layer": ffn.layer, "alignment": share, "chance": chance, "tokens": tokens})
    return {"name": attribute.name, "words": len(attribute.words), "layers": rows}


def _figures(folder: Path) -> dict[str, str]:
    """The rows of the `Result` table of the adapter's model card, where there is one."""
    path = folder / "README.md"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if "## Result" not in lines:
        return {}
    figures = {}
    for line in lines[lines.index("## Result") + 1 :]:
        if line.startswith("## "):
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 2 and cells[0] and not set(cells[0]) <= set("-: "):
            figures[cells[0]] = cells[1]
    return figures


def visible(token: str) -> str:
    """A token with its spaces and control characters shown: `·` for a space at either end, escapes for the rest."""
    inner = token.strip(" ")
    left = len(token) - len(token.lstrip(" "))
    right = 0 if left == len(token) else len(token) - len(token.rstrip(" "))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in inner)
    return "·" * left + shown + "·" * right


def render(data: dict[str, Any]) -> str:
    """The page as HTML."""
    return render_page("report.html.j2", data, visible=visible)
