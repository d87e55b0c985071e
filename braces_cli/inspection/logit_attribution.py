"""Which sub-updates make the model say a token: weights, relevance and direct effects, position by position.

    x_L   = embedding + sum_l attention_l + sum_l c_l (sum_j (w_lj + g r_lj) v_lj + bias_l)
    logit = u . x_L + constant        (`inspection.direct_effects`; u has the final norm's scale frozen at its value)

so the direct effect of a sub-update is c (w_j + g r_j) (u . v_j), and the parts add up to the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import FFN, layer_stack
from braces_cli.core.models.tokenization import context_length, encode, token_text
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.inspection.direct_effects import direction, joins
from braces_cli.inspection.ffn_weights import plain_ffns
from braces_cli.inspection.logit_lens import readout
from braces_cli.inspection.vector_tokens import Texts


@dataclass
class Run:
    """What one forward pass over a prompt showed; everything (positions, ...) in float32.

    Attributes:
        logits: of the model, (positions, vocabulary).
        last: what enters the final norm, (positions, d).
        first: what enters the first layer.
        outputs: what leaves each layer, by layer.
        weights: activation weights w (positions, d_ff), by layer.
        inputs: FFN inputs h (positions, d), by layer.
    """

    logits: Tensor
    last: Tensor
    first: Tensor
    outputs: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Effects:
    """Direct effects on one logit at each position; all (positions, ...) in float32.

    Attributes:
        logit: of the target by final norm and head, (positions,).
        parts: `embedding`, `attention` (summed over layers), `sub_updates`, `biases`; each (positions,).
        sub_updates: for each layer the effects (positions, d_ff).
        gated: for each layer g r (positions, d_ff); None where there is no relevance module.
        relevance: for each layer r (positions, d_ff), or None.
        attention: for each layer (positions,).
    """

    logit: Tensor
    parts: dict[str, Tensor]
    sub_updates: dict[int, Tensor]
    gated: dict[int, Tensor | None]
    relevance: dict[int, Tensor | None]
    attention: dict[int, Tensor]


def watch(session: Session, ids: Sequence[int], *, bare: bool = False) -> Run:
    """Run the model over `ids` once and keep what the trace needs.

    Args:
        bare: without the adapter.
    """
    model = session.base.model
    stack = layer_stack(model)[1]
    score = readout(model)
    seen: dict[Any, Tensor] = {}

    def before(key: Any) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            seen[key] = value.detach().float().reshape(-1, value.shape[-1])

        return hook

    def after(key: Any) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[key] = value.detach().float().reshape(-1, value.shape[-1])

        return hook

    with ExitStack() as handles, torch.no_grad():
        if bare and session.adapter is not None:
            handles.enter_context(session.adapter.disabled())
        handles.callback(stack[0].register_forward_pre_hook(before("first"), with_kwargs=True).remove)
        handles.callback(score.norm.register_forward_pre_hook(before("last"), with_kwargs=True).remove)
        for number, layer in enumerate(stack):
            handles.callback(layer.register_forward_hook(after(("out", number))).remove)
        for ffn in plain_ffns(session.ffns):
            read = ffn.keys[0].register_forward_pre_hook(before(("h", ffn.layer)), with_kwargs=True)
            write = ffn.value.register_forward_pre_hook(before(("w", ffn.layer)), with_kwargs=True)
            handles.callback(read.remove)
            handles.callback(write.remove)
        device = next(model.parameters()).device
        logits = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float()
    outputs = {number: seen["out", number] for number in range(len(stack))}
    # A model without a final norm reads its last layer's output as it is.
    last = seen.get("last", outputs[len(stack) - 1])
    run = Run(logits, last, seen["first"], outputs)
    run.weights = {ffn.layer: seen["w", ffn.layer] for ffn in plain_ffns(session.ffns)}
    run.inputs = {ffn.layer: seen["h", ffn.layer] for ffn in plain_ffns(session.ffns)}
    return run


def relevance(session: Session, ffn: FFN, h: Tensor) -> tuple[Tensor, Tensor] | None:
    """r and c g r, each (positions, d_ff), of the adapter's module at an FFN; None where there is none."""
    sites = session.adapter.sites if session.adapter is not None else []
    brace = next((brace for site, brace in sites if site.layer == ffn.layer), None)
    if brace is None:
        return None
    with torch.no_grad():
        r = brace.relevance_scores(h, ffn.value_matrix())
        return r, brace.gain * r


def effects(session: Session, run: Run, targets: list[int], factors: Sequence[float], *, bare: bool = False) -> Effects:
    """Direct effects of everything in `run` on the logit of `targets[i]` at position i.

    Args:
        factors: `linear.joins` of the FFNs.
        bare: the run was without the adapter.

    Raises:
        ModelError: the model's final norm allows none.
    """
    way = direction(readout(session.base.model), run.last, targets)
    u = way.u
    out = Effects((u * run.last).sum(dim=1) + way.constant, {}, {}, {}, {}, {})
    biases = way.constant.clone()
    by_layer = {ffn.layer: (ffn, factor) for ffn, factor in zip(plain_ffns(session.ffns), factors, strict=True)}
    before = run.first
    for number, output in run.outputs.items():
        layer_effect = (u * (output - before)).sum(dim=1)
        before = output
        if number in by_layer:
            ffn, factor = by_layer[number]
            found = None if bare else relevance(session, ffn, run.inputs[number])
            out.relevance[number], out.gated[number] = found or (None, None)
            weights = run.weights[number] if found is None else run.weights[number] + found[1]
            own = factor * weights * (u @ ffn.value_matrix().detach().float())
            out.sub_updates[number] = own
            bias = getattr(ffn.value, "bias", None)
            added = 0.0 if bias is None else factor * (u @ bias.detach().float())
            biases = biases + added
            layer_effect = layer_effect - own.sum(dim=1) - added
        out.attention[number] = layer_effect
    out.parts = {
        "embedding": (u * run.first).sum(dim=1),
        "attention": torch.stack(list(out.attention.values())).sum(dim=0),
        "sub_updates": torch.stack([own.sum(dim=1) for own in out.sub_updates.values()]).sum(dim=0),
        "biases": biases,
    }
    return out


@dataclass
class Traced:
    """A prompt looked at: token ids, the run with the adapter (or of the base alone) and that of the base beside it."""

    ids: list[int]
    targets: list[int]
    run: Run
    own: Effects
    base_run: Run | None = None
    base: Effects | None = None


def look(session: Session, prompt: str, target: int | None = None, report: Report = silent) -> Traced:
    """Run a prompt and take its logits apart.

    Args:
        target: the token whose logit is looked at, at every position; None is the model's own next token at each.

    Raises:
        ConfigError: more tokens than the model takes.
        ModelError: the architecture has no direct effects.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    ids = encode(tokenizer, prompt).ids
    room = context_length(model, tokenizer)
    if len(ids) > room:
        raise ConfigError(f"the prompt has {len(ids)} tokens", where="PROMPT", hint=f"The model takes {room}.")
    report("tracing", 0, 2)
    device = next(model.parameters()).device
    with session.adapter.disabled() if session.adapter is not None else nullcontext():
        factors = joins(model, plain_ffns(session.ffns), torch.tensor([ids], device=device))
    run = watch(session, ids)
    targets = run.logits.argmax(dim=1).tolist() if target is None else [target] * len(ids)
    traced = Traced(ids, targets, run, effects(session, run, targets, factors))
    report("tracing", 1, 2)
    if session.adapter is not None:
        # The same tokens, so that the two can stand beside each other.
        traced.base_run = watch(session, ids, bare=True)
        traced.base = effects(session, traced.base_run, targets, factors, bare=True)
    report("tracing", 2, 2)
    return traced


def trace(
    session: Session,
    prompt: str,
    *,
    target: int | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    top: int = 5,
    top_k: int = 5,
    report: Report = silent,
) -> dict[str, Any]:
    """`{prompt, tokens, positions: [...], layers: [{layer, position, sub_updates: [...]}]}`, see `look` for errors.

    A sub-update: `{index, weight` w`, relevance` r`, gated` g r`, effect, base_weight, base_effect, tokens}`, those of
    the largest effects first, whichever way they push; relevance and base figures are None without an adapter. A
    position: `{position, token, target, logit, base_logit, embedding, attention, sub_updates, biases, remainder}`, the
    four parts summing to the logit up to the remainder (rounding).
    """
    found = look(session, prompt, target, report)
    chosen = list(range(len(found.ids)) if positions is None else positions)
    texts = Texts(session.base.tokenizer)
    ffns = [ffn for ffn in plain_ffns(session.ffns) if layers is None or ffn.layer in layers]
    best = {f.layer: _strongest(found.own.sub_updates[f.layer][chosen], top) for f in ffns}
    named = _tokens(session, ffns, best, texts, top_k)
    rows = []
    for ffn in ffns:
        for position, indices in zip(chosen, best[ffn.layer].tolist(), strict=True):
            sub_updates = [
                _sub_update(found, ffn.layer, position, j) | {"tokens": named[ffn.layer, j]} for j in indices
            ]
            effect = float(found.own.sub_updates[ffn.layer][position].sum())
            rows.append({"layer": ffn.layer, "position": position, "effect": effect, "sub_updates": sub_updates})
    return {
        "prompt": prompt,
        "tokens": [token_text(session.base.tokenizer, token) for token in found.ids],
        "target": {"id": found.targets[-1], "token": texts[found.targets[-1]]},
        "positions": [_position(position, found, texts) for position in chosen],
        "layers": rows,
    }


def _strongest(effects: Tensor, top: int) -> Tensor:
    """Indices (positions, top) of the largest effects, whichever way they push."""
    return effects.abs().topk(min(top, effects.shape[1]), dim=1).indices


def _tokens(
    session: Session, ffns: Sequence[FFN], best: dict[int, Tensor], texts: Texts, top_k: int
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """`tokens` of the value vectors in `best` by (layer, index), each read once and all in one go."""
    places = [(ffn, index) for ffn in ffns for index in best[ffn.layer].unique().tolist()]
    vectors = torch.stack([ffn.value_matrix()[:, index].detach() for ffn, index in places])
    values, ids = readout(session.base.model).best(vectors, top_k)
    return {
        (ffn.layer, index): [{"id": t, "token": texts[t], "score": s} for t, s in zip(tokens, scores, strict=True)]
        for (ffn, index), scores, tokens in zip(places, values.tolist(), ids.tolist(), strict=True)
    }


def _position(position: int, found: Traced, texts: Texts) -> dict[str, Any]:
    target = found.targets[position]
    parts = {name: float(value[position]) for name, value in found.own.parts.items()}
    logit = float(found.own.logit[position])
    return {
        "position": position,
        "token": texts[found.ids[position]],
        "target": {"id": target, "token": texts[target]},
        "logit": logit,
        "model_logit": float(found.run.logits[position, target]),
        "base_logit": None if found.base is None else float(found.base.logit[position]),
        **parts,
        "remainder": logit - sum(parts.values()),
    }


def _sub_update(found: Traced, layer: int, position: int, index: int) -> dict[str, Any]:
    relevant, gated = found.own.relevance[layer], found.own.gated[layer]
    return {
        "index": index,
        "weight": float(found.run.weights[layer][position, index]),
        "relevance": None if relevant is None else float(relevant[position, index]),
        "gated": None if gated is None else float(gated[position, index]),
        "effect": float(found.own.sub_updates[layer][position, index]),
        "base_weight": None if found.base_run is None else float(found.base_run.weights[layer][position, index]),
        "base_effect": None if found.base is None else float(found.base.sub_updates[layer][position, index]),
    }
