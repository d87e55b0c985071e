"""A self-contained HTML page about a model and its adapter.

Text from models and users (tokens, names, settings) is escaped: in HTML by the template's autoescaping, for the script
as JSON without `<`. The script only sets `textContent`.
"""

import re
from typing import Any

import torch
from torch import Tensor

from braces_cli import __version__
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import layer_steering, steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import STEERING_SHARE, Attribute
from braces_cli.core.attributes.words import neutral_prompts, neutral_texts
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.generate import TextRequest, generate
from braces_cli.core.models.load import input_device
from braces_cli.core.models.tokenize import context_length, encode
from braces_cli.core.options import Sampling
from braces_cli.core.progress import Report, silent
from braces_cli.core.render import render as render_template
from braces_cli.core.text import public_name
from braces_cli.inspection.search import relevance_modules
from braces_cli.inspection.trace import prompt_ids, record_activations, trace
from braces_cli.inspection.vocabulary import LogitLens, plain_ffns

_AMPLIFIED = 24  # value vectors in the table
_TOKENS = 8  # tokens per value vector
_SUB_UPDATES = 5  # sub-updates per cell of the heat map
_STRENGTHS = (-3.0, 0.0, 3.0)  # of the examples
_NEW_TOKENS, _PROMPTS = 24, 3
_LEAST = 0.01  # smallest share of a layer that is shown
_WORD = re.compile(r"\s[^\W\d_]{2,}\Z")
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
        "strengths": list(_STRENGTHS),
        "attributes": [_steering(session, lens, attribute, prompt) for attribute in found],
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
    plain = _head(lens, run.last)
    for row in rows:
        vector = row.pop("vector").to(run.last)
        scale = run.last.norm(dim=1, keepdim=True) / vector.norm().clamp(min=1e-30)
        row["tokens"] = _promoted(lens, plain, _head(lens, run.last + scale * vector))
    return rows


def _head(lens: LogitLens, states: Tensor) -> Tensor:
    """Log probabilities of the next token from inputs of the final norm, (states, vocabulary)."""
    hidden = lens.hidden(states.to(lens.weight))
    return torch.cat([scores.float().clone() for _, scores in lens.blocks(hidden)], dim=1).log_softmax(dim=-1)


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


def _steering(session: Session, lens: LogitLens, attribute: Attribute, prompt: str) -> dict[str, Any]:
    """Layers that steering by an attribute changes, each with its share and the tokens that it promotes; and texts.

    A layer is steered alone, at the strength at which it moves the residual stream by 10 %. Its share is that of the
    sum of KL(unsteered || steered) over layers at s = 1, where KL grows as the square of the strength.
    """
    plain = _next_tokens(session)
    rows: list[dict[str, Any]] = []
    for each in layer_steering(session, [(attribute, 1.0)]):
        if each.share == 0:
            continue
        strength = STEERING_SHARE / each.share
        with steered(session, [(attribute, strength)], [each.layer]):
            moved = _next_tokens(session)
        kl = float((plain.exp() * (plain - moved)).sum(dim=1).mean()) / strength**2
        rows.append({"layer": each.layer, "share": kl, "tokens": _promoted(lens, plain, moved)})
    total = sum(row["share"] for row in rows) or 1.0
    rows = [row | {"share": row["share"] / total} for row in rows]
    shown = [row for row in rows if row["share"] >= _LEAST]
    base, texts = session.base, {}
    sampling = Sampling(min(_NEW_TOKENS, context_length(base.model.config, base.tokenizer) // 2))
    requests = [TextRequest(each, index) for index, each in enumerate([prompt, *neutral_prompts()[:_PROMPTS]])]
    for s in _STRENGTHS:
        with steered(session, [(attribute, s)]):
            texts[s] = generate(base.model, base.tokenizer, requests, sampling, turn_ends=session.turn_ends)
    examples = [
        {"prompt": each.prompt, "texts": [{"s": s, "text": texts[s][each.index]} for s in _STRENGTHS]}
        for each in requests
    ]
    return {"name": attribute.name, "layers": shown, "hidden": len(rows) - len(shown), "examples": examples}


def _next_tokens(session: Session) -> Tensor:
    """Log probabilities of the next token after each token of the neutral texts, (tokens, vocabulary)."""
    base, found = session.base, []
    for text in neutral_texts():
        ids = torch.tensor([encode(base.tokenizer, text).ids], device=input_device(base.model))
        with torch.no_grad():
            found.append(base.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(dim=-1))
    return torch.cat(found)


def _promoted(lens: LogitLens, plain: Tensor, moved: Tensor) -> list[str]:
    """Tokens whose log probability rises most, the mean over the places of `plain` and `moved` (places, vocabulary).

    Of a vocabulary with words only tokens that begin a word, and the likelier half of them: others are fragments.
    """
    rise, likely = (moved - plain).mean(dim=0), plain.exp().mean(dim=0)
    words = torch.tensor([bool(_WORD.match(text)) for text in lens.vocabulary.texts], device=rise.device)
    if int(words.sum()) >= 2 * _TOKENS:
        rise = rise.masked_fill(~words | (likely < likely[words].median()), -torch.inf)
    return [lens.text(token) for token in rise.topk(_TOKENS).indices.tolist()]


def visible(token: str) -> str:
    """A token with `·` for spaces and escapes for control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token.replace(" ", "·"))


def render(data: dict[str, Any]) -> str:
    """The page as HTML."""
    return render_template("pages/report.html.j2", data, visible=visible)
