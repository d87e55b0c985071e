"""The straight way from a sub-update to a logit, found by what the modules do rather than by what they are called.

With its scale frozen at the value it has, the final norm is linear, so the logit of token t at position i is

    logit = u_i . x_i + constant,    u_i = gamma * (weight of t) / scale_i   (mean taken off where the norm centres)

and x_i is the sum of the embedding, the attention outputs and the FFN outputs: an FFN output c_l f adds c_l u_i . f.

Which sub-updates make the model say a token: weights, relevance and direct effects, position by position.

    x_L   = embedding + sum_l attention_l + sum_l c_l (sum_j (w_lj + g r_lj) v_lj + bias_l)
    logit = u . x_L + constant        (`inspection.trace`; u has the final norm's scale frozen at its value)

so the direct effect of a sub-update is c (w_j + g r_j) (u . v_j), and the parts add up to the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.model import Session
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import FFN, layer_stack, residual_factors
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import layer_output
from braces_cli.core.models.tokenize import context_length, encode, token_text
from braces_cli.core.models.weights import stored_bias
from braces_cli.core.progress import Report, silent
from braces_cli.inspection.search import relevance_module, relevance_scores
from braces_cli.inspection.vocabulary import LogitLens, TokenTexts, best_tokens, plain_ffns

# How far a module may be from the form it is taken for; half precision rounds at 4e-3.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class Direction:
    """d(logit)/dx with the scale frozen.

    Attributes:
        u: (positions, d), float32.
        constant: (positions,), what the biases of norm and head give the logit.
    """

    u: Tensor
    constant: Tensor


def direction(lens: LogitLens, x: Tensor, tokens: list[int]) -> Direction:
    """Where the residual stream must move to raise the logit of `tokens[i]` at position i.

    Args:
        x: what enters the final norm, (positions, d).

    Raises:
        ModelError: the final norm is not of the form gamma * x / scale + beta.
    """
    kind = next((p.dtype for p in lens.norm.parameters()), x.dtype)
    with torch.no_grad():
        gamma, beta, centred = _affine(lens.norm, x.shape[1], x.device, kind)
        z = x.float() - x.float().mean(dim=1, keepdim=True) if centred else x.float()
        normed = lens.norm(x.to(kind)).float().to(x.device) - beta
        flat = gamma * z
        # The scale that the norm really used, eps and all: the one factor between the two.
        inverse = (flat * normed).sum(dim=1) / (flat * flat).sum(dim=1).clamp(min=1e-30)
        wrong = (normed - flat * inverse[:, None]).abs().max() / normed.abs().max().clamp(min=1e-30)
        if wrong > _TOLERANCE.get(kind, 3e-2):
            name = type(lens.norm).__name__
            hint = "Direct effects need a final LayerNorm or RMSNorm."
            raise ModelError(f"the final norm ({name}) is not linear once its scale is frozen", hint=hint)
        rows = {token: lens.row(token) for token in set(tokens)}
        heads = torch.stack([rows[token][0] for token in tokens]).to(x.device)
        biases = torch.tensor([rows[token][1] for token in tokens], device=x.device)
        if lens.narrow is not None:
            heads = heads @ lens.narrow.weight.detach().float().to(x.device)
        u = gamma * heads * inverse[:, None]
        if centred:
            u = u - u.mean(dim=1, keepdim=True)
        return Direction(u, heads @ beta + biases)


def _affine(norm: nn.Module, width: int, device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """gamma (d,), beta (d,) and whether the mean is taken off, from what the norm makes of four vectors."""

    def normed(x: Tensor) -> Tensor:
        y: Tensor = norm(x.to(dtype)[None])[0]
        return y.float().to(device)

    probe = torch.ones(width, device=device)
    probe[1::2] = -1
    probe = probe - probe.mean()
    beta, out, lifted = normed(torch.zeros_like(probe)), normed(probe), normed(probe + 3)
    rms = probe.pow(2).mean().sqrt()
    centred = bool(torch.allclose(out, lifted, rtol=2e-2, atol=1e-3 * float((out - beta).abs().max())))
    is_norm = bool(torch.allclose(normed(2 * probe), out, rtol=2e-2, atol=1e-3))
    return (out - beta) / probe * (rms if is_norm else 1.0), beta, centred


def direct_factors(model: Any, ffns: list[FFN], ids: Tensor) -> list[float]:
    """c_l of each FFN: what its output is multiplied by where it joins the residual stream (1 in most models).

    Raises:
        ModelError: it joins in another way (Gemma 2 normalises it first).
    """
    factors: list[float] = []
    for ffn, factor in zip(ffns, residual_factors(model, ffns, ids), strict=True):
        if factor is None:
            hint = "Direct effects need FFN outputs that are added unchanged, or times a constant."
            raise ModelError(f"layer {ffn.layer} changes its FFN's output before it joins the stream", hint=hint)
        factors.append(factor)
    return factors


@dataclass(frozen=True)
class Activations:
    """What one forward pass over a prompt computed; everything (positions, ...), in float32, on one device.

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
    outputs: dict[int, Tensor]
    weights: dict[int, Tensor]
    inputs: dict[int, Tensor]


@dataclass(frozen=True)
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


def record_activations(session: Session, ids: Sequence[int], *, bare: bool = False) -> Activations:
    """Run the model over `ids` once and record what the attribution needs.

    Args:
        bare: without the adapter.
    """
    model = session.base.model
    stack = layer_stack(model)[1]
    lens = LogitLens(model)
    # Under a device map layers run on several devices.
    device = input_device(model)
    seen: dict[Any, Tensor] = {}

    def record(key: Any, value: Tensor) -> None:
        seen[key] = value.detach().float().to(device).reshape(-1, value.shape[-1])

    def before(key: Any) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            record(key, args[0] if args else kwargs["hidden_states"])

        return hook

    def after(key: Any) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            record(key, layer_output(output))

        return hook

    with ExitStack() as handles, torch.no_grad():
        if bare and session.adapter is not None:
            handles.enter_context(session.adapter.disabled())
        handles.callback(stack[0].register_forward_pre_hook(before("first"), with_kwargs=True).remove)
        handles.callback(lens.norm.register_forward_pre_hook(before("last"), with_kwargs=True).remove)
        for number, layer in enumerate(stack):
            handles.callback(layer.register_forward_hook(after(("out", number))).remove)
        for ffn in plain_ffns(session.ffns):
            read = ffn.keys[0].register_forward_pre_hook(before(("h", ffn.layer)), with_kwargs=True)
            write = ffn.value.register_forward_pre_hook(before(("w", ffn.layer)), with_kwargs=True)
            handles.callback(read.remove)
            handles.callback(write.remove)
        logits = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    outputs = {number: seen["out", number] for number in range(len(stack))}
    # A model without a final norm reads its last layer's output as it is.
    last = seen.get("last", outputs[len(stack) - 1])
    weights = {ffn.layer: seen["w", ffn.layer] for ffn in plain_ffns(session.ffns)}
    inputs = {ffn.layer: seen["h", ffn.layer] for ffn in plain_ffns(session.ffns)}
    return Activations(logits.float().to(device), last, seen["first"], outputs, weights, inputs)


def direct_effects(
    session: Session, run: Activations, targets: list[int], factors: Sequence[float], *, bare: bool = False
) -> Effects:
    """Direct effects of everything in `run` on the logit of `targets[i]` at position i.

    Args:
        factors: `direct_factors` of the FFNs.
        bare: the run was without the adapter.

    Raises:
        ModelError: the model's final norm has no linear form.
    """
    way = direction(LogitLens(session.base.model), run.last, targets)
    u = way.u
    by_layer = {ffn.layer: (ffn, factor) for ffn, factor in zip(plain_ffns(session.ffns), factors, strict=True)}
    sub_updates: dict[int, Tensor] = {}
    relevance: dict[int, Tensor | None] = {}
    gated: dict[int, Tensor | None] = {}
    attention: dict[int, Tensor] = {}
    biases = way.constant.clone()
    before = run.first
    for layer, output in run.outputs.items():
        rest = (u * (output - before)).sum(dim=1)
        before = output
        if layer in by_layer:
            ffn, factor = by_layer[layer]
            values = ffn.value_matrix().detach().float().to(u.device)
            module = None if bare else relevance_module(session, ffn)
            weights = run.weights[layer]
            relevance[layer] = gated[layer] = None
            if module is not None:
                scores, change = relevance_scores(module, run.inputs[layer], values)
                relevance[layer], gated[layer], weights = scores, change, weights + change
            sub_updates[layer] = factor * weights * (u @ values)
            bias = stored_bias(ffn.value)
            added = torch.zeros_like(rest) if bias is None else factor * (u @ bias.float().to(u.device))
            biases = biases + added
            rest = rest - sub_updates[layer].sum(dim=1) - added
        attention[layer] = rest
    parts = {
        "embedding": (u * run.first).sum(dim=1),
        "attention": torch.stack(list(attention.values())).sum(dim=0),
        "sub_updates": torch.stack([effects.sum(dim=1) for effects in sub_updates.values()]).sum(dim=0),
        "biases": biases,
    }
    logit = (u * run.last).sum(dim=1) + way.constant
    return Effects(logit, parts, sub_updates, gated, relevance, attention)


@dataclass(frozen=True)
class Attribution:
    """Where the logits of a prompt come from.

    Attributes:
        ids: tokens of the prompt.
        targets: the token whose logit is taken apart, at each position.
        run, effects: with the adapter, or of the base where there is none.
        base_run, base_effects: of the base beside its adapter; None where there is none.
    """

    ids: list[int]
    targets: list[int]
    run: Activations
    effects: Effects
    base_run: Activations | None = None
    base_effects: Effects | None = None


def attribute_logits(session: Session, prompt: str, target: int | None = None, report: Report = silent) -> Attribution:
    """Run a prompt and take its logits apart.

    Args:
        target: the token whose logit is looked at, at every position; None is the model's own next token at each.

    Raises:
        ConfigError: more tokens than the model takes.
        ModelError: the architecture has no direct effects.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    ids = encode(tokenizer, prompt).ids
    max_length = context_length(model.config, tokenizer)
    if len(ids) > max_length:
        raise ConfigError(f"the prompt has {len(ids)} tokens", where="PROMPT", hint=f"The model takes {max_length}.")
    report("tracing", 0, 2)
    with session.adapter.disabled() if session.adapter is not None else nullcontext():
        factors = direct_factors(model, plain_ffns(session.ffns), torch.tensor([ids], device=input_device(model)))
    run = record_activations(session, ids)
    targets = run.logits.argmax(dim=1).tolist() if target is None else [target] * len(ids)
    found = Attribution(ids, targets, run, direct_effects(session, run, targets, factors))
    report("tracing", 1, 2)
    if session.adapter is not None:
        # The same targets, so that the two can be compared.
        base_run = record_activations(session, ids, bare=True)
        base_effects = direct_effects(session, base_run, targets, factors, bare=True)
        found = replace(found, base_run=base_run, base_effects=base_effects)
    report("tracing", 2, 2)
    return found


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
    """`{prompt, tokens, positions: [...], layers: [{layer, position, sub_updates: [...]}]}`.

    Errors are those of `attribute_logits`.

    A sub-update: `{index, weight` w`, relevance` r`, gated` g r`, effect, base_weight, base_effect, tokens}`, those of
    the largest effects first, whichever way they push; relevance and base figures are None without an adapter. A
    position: `{position, token, target, logit, base_logit, embedding, attention, sub_updates, biases, remainder}`, the
    four parts summing to the logit up to the remainder (rounding).
    """
    found = attribute_logits(session, prompt, target, report)
    chosen = list(range(len(found.ids)) if positions is None else positions)
    texts = TokenTexts(session.base.tokenizer)
    ffns = [ffn for ffn in plain_ffns(session.ffns) if layers is None or ffn.layer in layers]
    best = {f.layer: _strongest(found.effects.sub_updates[f.layer][chosen], top) for f in ffns}
    named = _tokens(session, ffns, best, texts, top_k)
    rows = []
    for ffn in ffns:
        for position, indices in zip(chosen, best[ffn.layer].tolist(), strict=True):
            sub_updates = [
                _sub_update(found, ffn.layer, position, j) | {"tokens": named[ffn.layer, j]} for j in indices
            ]
            effect = float(found.effects.sub_updates[ffn.layer][position].sum())
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
    session: Session, ffns: Sequence[FFN], best: dict[int, Tensor], texts: TokenTexts, top_k: int
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """`tokens` of the value vectors in `best` by (layer, index), each read once and all in one go."""
    places = [(ffn, index) for ffn in ffns for index in best[ffn.layer].unique().tolist()]
    lens = LogitLens(session.base.model)
    vectors = [ffn.value_matrix()[:, best[ffn.layer].unique().cpu()].detach().mT.to(lens.device) for ffn in ffns]
    listed = best_tokens(lens, texts, torch.cat(vectors), top_k)
    return {(ffn.layer, index): tokens for (ffn, index), tokens in zip(places, listed, strict=True)}


def _position(position: int, found: Attribution, texts: TokenTexts) -> dict[str, Any]:
    target = found.targets[position]
    parts = {name: float(value[position]) for name, value in found.effects.parts.items()}
    logit = float(found.effects.logit[position])
    return {
        "position": position,
        "token": texts[found.ids[position]],
        "target": {"id": target, "token": texts[target]},
        "logit": logit,
        "model_logit": float(found.run.logits[position, target]),
        "base_logit": None if found.base_effects is None else float(found.base_effects.logit[position]),
        **parts,
        "remainder": logit - sum(parts.values()),
    }


def _sub_update(found: Attribution, layer: int, position: int, index: int) -> dict[str, Any]:
    relevance, gated = found.effects.relevance[layer], found.effects.gated[layer]
    base_run, base_effects = found.base_run, found.base_effects
    return {
        "index": index,
        "weight": float(found.run.weights[layer][position, index]),
        "relevance": None if relevance is None else float(relevance[position, index]),
        "gated": None if gated is None else float(gated[position, index]),
        "effect": float(found.effects.sub_updates[layer][position, index]),
        "base_weight": None if base_run is None else float(base_run.weights[layer][position, index]),
        "base_effect": None if base_effects is None else float(base_effects.sub_updates[layer][position, index]),
    }
