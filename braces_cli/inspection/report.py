"""A self-contained HTML page about a model and its adapter.

Text from models and users (tokens, names, settings) is escaped: in HTML by the template's autoescaping, for the script
as JSON without `<`. The script only sets `textContent`.
"""

import math
from typing import Any

import torch

from braces_cli import __version__
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import layer_steering
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN
from braces_cli.core.progress import Report, silent
from braces_cli.core.render import render as render_template
from braces_cli.core.text import public_name
from braces_cli.inspection.search import relevance_modules
from braces_cli.inspection.trace import prompt_ids, record_activations, trace
from braces_cli.inspection.vocabulary import LogitLens, plain_ffns

_AMPLIFIED = 24  # value vectors in the table
_TOKENS = 8  # tokens per value vector
_SUB_UPDATES = 5  # sub-updates per cell of the heat map
# For adapters that were trained without attributes.
_ATTRIBUTES = ["positive", "negative"]


def report_data(
    session: Session, lens: LogitLens, prompt: str, target: int | None = None, report: Report = silent
) -> dict[str, Any]:
    """Return the data of the page: `{model, adapter, gates, amplified, heat, attributes, training, ...}`.

    Raises:
        ConfigError: the prompt is longer than the context of the model.
        ModelError: the model is a mixture of experts.
    """
    ffns, config = plain_ffns(session.ffns), session.config
    modules = relevance_modules(session)
    ids = prompt_ids(session, prompt, "--prompt")
    names = (config.attributes if config is not None else []) or _ATTRIBUTES
    found = [find_attribute(session, each, None, report) for each in names]
    return {
        "version": __version__,
        "model": public_name(session.base.name),
        "adapter": None if session.folder is None else session.folder.name,
        "rank": None if config is None else config.r,
        "layers": len(ffns),
        "value_vectors": sum(ffn.value_vectors for ffn in ffns),
        "hidden_size": ffns[0].hidden_size,
        "gates": [{"layer": layer, "gate": float(module.g.detach().abs().mean())} for layer, module in modules.items()],
        "amplified": _amplified(session, ffns, lens, ids),
        "heat": _heat(session, lens, ids, target),
        "attributes": [_steering(session, lens, attribute) for attribute in found],
        "training": {} if config is None else {k: v for k, v in config.training.items() if v is not None},
    }


def _amplified(session: Session, ffns: list[FFN], lens: LogitLens, ids: list[int]) -> list[dict[str, Any]]:
    """The value vectors with the largest mean of |g r_ij| |v_j| over the prompt, without an adapter |w_ij| |v_j|."""
    run = record_activations(session, ffns, lens, ids)
    modules = relevance_modules(session)
    rows = []
    for ffn in ffns:
        if session.adapter is not None and ffn.layer not in modules:
            continue
        values, weights = ffn.value_matrix().detach().to(run.last.device), run.weights[ffn.layer]
        change = weights
        if ffn.layer in modules:
            module = modules[ffn.layer]
            with torch.no_grad():
                _, change = module.relevance_scores(run.queries[ffn.layer], values)
        strength = change.abs().mean(dim=0) * values.float().norm(dim=0)
        best = strength.topk(min(_AMPLIFIED, len(strength)))
        for size, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row = {"layer": ffn.layer, "index": index, "strength": size, "vector": values[:, index].clone()}
            rows.append(row | {"weight": float(weights[:, index].mean()), "change": float(change[:, index].mean())})
    rows = sorted(rows, key=lambda row: -row["strength"])[:_AMPLIFIED]
    ids_of_rows = lens.best(torch.stack([row.pop("vector") for row in rows]), _TOKENS)[1].tolist()
    return [row | {"tokens": [lens.text(t) for t in tokens]} for row, tokens in zip(rows, ids_of_rows, strict=True)]


def _heat(session: Session, lens: LogitLens, ids: list[int], target: int | None) -> dict[str, Any]:
    """`{tokens, targets, layers: [{layer, cells: [{effect, sub_updates}]}], largest, asked}`.

    `{reason}` if the architecture has no direct effects.
    """
    try:
        found = trace(session, lens, ids, target=target, top=_SUB_UPDATES, top_k=_SUB_UPDATES)
    except ModelError as error:
        return {"reason": error.message}
    layers: dict[int, list[dict[str, Any]]] = {}
    for cell in found["layers"]:
        for update in cell["sub_updates"]:
            update["tokens"] = [visible(token["token"]) for token in update["tokens"]]
        layers.setdefault(cell["layer"], []).append(cell)
    return {
        "tokens": found["tokens"],
        "targets": [row["target"]["token"] for row in found["positions"]],
        "layers": [{"layer": layer, "cells": cells} for layer, cells in layers.items()],
        "largest": max(abs(cell["effect"]) for cell in found["layers"]) or 1.0,
        "asked": target is not None,
    }


def _steering(session: Session, lens: LogitLens, attribute: Attribute) -> dict[str, Any]:
    """Layers that steering by an attribute changes, with the tokens that the added vector promotes.

    For an attribute through the adapter also its alignment with the layer's projection, |R p| / |p|; `chance` is
    the alignment of a random subspace of the same rank, about sqrt(rank / d).
    """
    modules, rows = relevance_modules(session), []
    for each in layer_steering(session, [(attribute, 1.0)]):
        alignment, chance = None, None
        if each.shift is not None:
            module = modules[each.layer]
            state = attribute.state_at(module.relevance_to)[attribute.layers.index(each.layer)]
            projection = module.projection().detach().float().cpu()
            alignment = float((projection @ state).norm() / state.norm().clamp(min=1e-30))
            chance = math.sqrt(len(projection) / len(state))
        tokens = [lens.text(t) for t in lens.best(each.total.to(lens.weight), _TOKENS)[1][0].tolist()]
        rows.append({"layer": each.layer, "alignment": alignment, "chance": chance, "tokens": tokens})
    return {"name": attribute.name, "words": len(attribute.words), "layers": rows}


def visible(token: str) -> str:
    """A token with `·` for spaces and escapes for control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token.replace(" ", "·"))


def render(data: dict[str, Any]) -> str:
    """The page as HTML."""
    return render_template("pages/report.html.j2", data, visible=visible)
