"""Direct effects of sub-updates on the logit of a token, position by position.

    x_L     = embedding + sum_l attention_l + sum_l c_l (sum_j (w_lj + g r_lj) v_lj + bias_l)
    logit   = u . x_L + constant,    u = gamma * (weight of the token in the LM head) / scale
    effect  = c_l (w_lj + g r_lj) (u . v_lj)

The scale of the final norm is held at its value, which makes the norm linear (u loses its mean if the norm subtracts
the mean), so the effects of embedding, attention, sub-updates and biases add up to the logit. c_l is the constant that
the model multiplies an FFN output by, 1 in most models. gamma, scale and c_l are measured, not read from the modules.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.layer import RelevanceModule
from braces_cli.core.adapter.model import Session
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import FFN, layer_stack, watch_output
from braces_cli.core.models.load import input_device
from braces_cli.core.models.residual import residual_factors
from braces_cli.core.models.structure import layer_output
from braces_cli.core.models.tokenize import context_length, encode
from braces_cli.core.models.weights import stored_bias
from braces_cli.inspection.search import relevance_modules
from braces_cli.inspection.vocabulary import LogitLens, plain_ffns

# Largest relative deviation of the final norm from its linear form; half precision rounds at 4e-3.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


def prompt_ids(session: Session, prompt: str, where: str) -> list[int]:
    """Return the tokens of a prompt.

    Raises:
        ConfigError: the prompt is longer than the context of the model.
    """
    ids = encode(session.base.tokenizer, prompt).ids
    limit = context_length(session.base.model.config, session.base.tokenizer)
    if len(ids) > limit:
        raise ConfigError(f"the prompt has {len(ids)} tokens", where=where, hint=f"The limit is {limit}.")
    return ids


@dataclass(frozen=True)
class Activations:
    """Values of one forward pass over a prompt, (positions, ...) in float32 on one device.

    Attributes:
        logits: (positions, vocabulary).
        first: input of the first layer, (positions, d).
        last: input of the final norm, (positions, d).
        outputs: output of each layer, (positions, d).
        queries: what relevance compares the value vectors of each layer with: FFN input, or with an adapter with
            relevance to the output the FFN output before the side path, (positions, d).
        weights: activation weights w of each layer, (positions, d_ff).
    """

    logits: Tensor
    first: Tensor
    last: Tensor
    outputs: list[Tensor]
    queries: dict[int, Tensor]
    weights: dict[int, Tensor]


def record_activations(session: Session, ffns: Sequence[FFN], lens: LogitLens, ids: Sequence[int]) -> Activations:
    """Run the model over `ids` once and record its activations."""
    model = session.base.model
    stack = layer_stack(model)[1]
    device = input_device(model)
    seen: dict[Any, Tensor] = {}

    def record(key: Any, value: Tensor) -> None:
        # With a device map the layers run on several devices.
        seen[key] = value.detach().float().to(device).reshape(-1, value.shape[-1])

    def record_input(module: nn.Module, args: tuple, kwargs: dict, key: Any) -> None:
        record(key, args[0] if args else kwargs["hidden_states"])

    def record_output(module: nn.Module, args: tuple, output: Any, key: Any) -> None:
        record(key, layer_output(output))

    inputs: dict[Any, nn.Module] = {"first": stack[0], "last": lens.norm}
    to_output = session.adapter is not None and session.adapter.relevance_to == "output"
    for ffn in ffns:
        inputs |= {("weights", ffn.layer): ffn.value}
        if not to_output:
            inputs |= {("query", ffn.layer): ffn.keys[0]}
    with ExitStack() as context, torch.no_grad():
        for key, module in inputs.items():
            handle = module.register_forward_pre_hook(partial(record_input, key=key), with_kwargs=True)
            context.callback(handle.remove)
        for number, layer in enumerate(stack):
            handle = layer.register_forward_hook(partial(record_output, key=("output", number)))
            context.callback(handle.remove)
        for ffn in ffns if to_output else ():
            context.callback(watch_output(ffn, partial(record, ("query", ffn.layer))).remove)
        logits = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    outputs = [seen["output", number] for number in range(len(stack))]
    return Activations(
        logits=logits.float().to(device),
        first=seen["first"],
        last=seen.get("last", outputs[-1]),  # without a final norm, the head reads the output of the last layer
        outputs=outputs,
        queries={ffn.layer: seen["query", ffn.layer] for ffn in ffns},
        weights={ffn.layer: seen["weights", ffn.layer] for ffn in ffns},
    )


def logit_direction(lens: LogitLens, x: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """u (positions, d) and the constant (positions,) of the logits of `tokens[i]` at position i, in float32.

    Args:
        x: input of the final norm, (positions, d).

    Raises:
        ModelError: the final norm is not gamma * x / scale + beta.
    """
    dtype = next((p.dtype for p in lens.norm.parameters()), x.dtype)

    def normed(y: Tensor) -> Any:
        return lens.norm(y.to(dtype)).float().to(x.device)

    with torch.no_grad():
        # Alternating +1 and -1: gamma, up to a factor, and beta follow from the outputs for 0, the probe and a shift.
        probe = torch.ones(1, x.shape[1], device=x.device)
        probe[:, 1::2] = -1
        probe = probe - probe.mean()
        beta, out, shifted = (normed(y) for y in (torch.zeros_like(probe), probe, probe + 3))
        centred = torch.allclose(out, shifted, rtol=2e-2, atol=1e-3 * float((out - beta).abs().max()))
        gamma = (out - beta) / probe

        z = x.float() - x.float().mean(dim=1, keepdim=True) if centred else x.float()
        flat, output = gamma * z, normed(x) - beta
        # 1 / scale, including the norm's epsilon: the factor between the two.
        inverse = (flat * output).sum(dim=1) / (flat * flat).sum(dim=1).clamp(min=1e-30)
        wrong = (output - flat * inverse[:, None]).abs().max() / output.abs().max().clamp(min=1e-30)
        if wrong > _TOLERANCE.get(dtype, 3e-2):
            name = type(lens.norm).__name__
            hint = "Direct effects need a final LayerNorm or RMSNorm."
            raise ModelError(f"the final norm ({name}) is not linear for a fixed scale", hint=hint)

        heads = lens.weight[tokens].float().to(x.device)
        bias = torch.zeros(len(tokens)) if lens.bias is None else lens.bias[tokens].float()
        if lens.narrow is not None:
            heads = heads @ lens.narrow.weight.detach().float().to(x.device)
        u = gamma * heads * inverse[:, None]
        if centred:
            u = u - u.mean(dim=1, keepdim=True)
        return u, heads @ beta[0] + bias.to(x.device)


@dataclass(frozen=True)
class Effects:
    """Direct effects on one logit per position, (positions, ...) in float32.

    Attributes:
        run: activations that the effects are computed from.
        targets: token of the decomposed logit at each position.
        logit: of the target, by final norm and head, (positions,).
        parts: `embedding`, `attention` and `sub_updates` (summed over layers), `biases`; each (positions,).
        attention: of each layer, (positions,).
        sub_updates: of each layer, (positions, d_ff).
        relevance: r of each adapted layer, (positions, d_ff).
        gated: g r of each adapted layer, (positions, d_ff).
    """

    run: Activations
    targets: list[int]
    logit: Tensor
    parts: dict[str, Tensor]
    attention: list[Tensor]
    sub_updates: dict[int, Tensor]
    relevance: dict[int, Tensor]
    gated: dict[int, Tensor]


def direct_effects(
    ffns: Sequence[FFN],
    lens: LogitLens,
    run: Activations,
    targets: list[int],
    factors: Sequence[float],
    modules: dict[int, RelevanceModule],
) -> Effects:
    """Direct effects in `run` on the logit of `targets[i]` at position i.

    Args:
        factors: c of each FFN.
        modules: modules of the adapter that were enabled in `run`, by layer.
    """
    u, constant = logit_direction(lens, run.last, targets)
    by_layer = {ffn.layer: (ffn, factor) for ffn, factor in zip(ffns, factors, strict=True)}
    sub_updates: dict[int, Tensor] = {}
    relevance: dict[int, Tensor] = {}
    gated: dict[int, Tensor] = {}
    attention: list[Tensor] = []
    biases = constant.clone()
    before = run.first
    for layer, output in enumerate(run.outputs):
        # The attention's part is the rest of what the layer adds to the residual stream.
        rest = (u * (output - before)).sum(dim=1)
        before = output
        if layer in by_layer:
            ffn, factor = by_layer[layer]
            values = ffn.value_matrix().detach().float().to(u.device)
            weights = run.weights[layer]
            if layer in modules:
                with torch.no_grad():
                    relevance[layer], gated[layer] = modules[layer].relevance_scores(run.queries[layer], values)
                weights = weights + gated[layer]
            sub_updates[layer] = factor * weights * (u @ values)
            rest = rest - sub_updates[layer].sum(dim=1)
            bias = stored_bias(ffn.value)
            if bias is not None:
                effect = factor * (u @ bias.float().to(u.device))
                biases, rest = biases + effect, rest - effect
        attention.append(rest)
    parts = {
        "embedding": (u * run.first).sum(dim=1),
        "attention": torch.stack(attention).sum(dim=0),
        "sub_updates": torch.stack([effects.sum(dim=1) for effects in sub_updates.values()]).sum(dim=0),
        "biases": biases,
    }
    logit = (u * run.last).sum(dim=1) + constant
    return Effects(run, targets, logit, parts, attention, sub_updates, relevance, gated)


def attribute_logits(
    session: Session, lens: LogitLens, ids: list[int], target: int | None = None
) -> tuple[Effects, Effects | None]:
    """Decompose the logit of `target`, or of the most probable next token, at each position of a prompt.

    Returns:
        The effects, and those on the same targets with the adapter disabled; None for a bare base.

    Raises:
        ModelError: the architecture has no direct effects.
    """
    model = session.base.model
    ffns = plain_ffns(session.ffns)
    factors: list[float] = []
    base_run = None
    with session.bare():
        measured = residual_factors(model, ffns, torch.tensor([ids], device=input_device(model)))
        for ffn, factor in zip(ffns, measured, strict=True):
            if factor is None:
                hint = "Direct effects need FFN outputs that are added unchanged, or times a constant."
                what = f"layer {ffn.layer} changes its FFN's output before adding it to the residual stream"
                raise ModelError(what, hint=hint)
            factors.append(factor)
        if session.adapter is not None:
            base_run = record_activations(session, ffns, lens, ids)
    run = record_activations(session, ffns, lens, ids)
    targets = run.logits.argmax(dim=1).tolist() if target is None else [target] * len(ids)
    effects = direct_effects(ffns, lens, run, targets, factors, relevance_modules(session))
    return effects, None if base_run is None else direct_effects(ffns, lens, base_run, targets, factors, {})


def trace(
    session: Session,
    lens: LogitLens,
    ids: list[int],
    *,
    target: int | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    top: int = 5,
    top_k: int = 5,
) -> dict[str, Any]:
    """Return `{tokens, target, positions: [...], layers: [{layer, position, effect, sub_updates: [...]}]}`.

    A sub-update is `{index, weight, relevance, gated, effect, base_weight, base_effect, tokens}`, largest absolute
    effect first; `gated` is g r, and for a bare base relevance and base figures have the value None. A position is
    `{position, token, target, logit, model_logit, base_logit, embedding, attention, sub_updates, biases, remainder}`;
    the four parts and the remainder (rounding) add up to the logit.

    Args:
        ids: tokens of the prompt.

    Raises:
        ModelError: the architecture has no direct effects.
    """
    effects, base = attribute_logits(session, lens, ids, target)
    chosen = list(range(len(ids)) if positions is None else positions)
    rows: list[dict[str, Any]] = []
    vectors: dict[tuple[int, int], Tensor] = {}
    for ffn in plain_ffns(session.ffns):
        if layers is not None and ffn.layer not in layers:
            continue
        values = ffn.value_matrix().detach()
        of_layer = effects.sub_updates[ffn.layer]
        for position in chosen:
            best = of_layer[position].abs().topk(min(top, of_layer.shape[1])).indices.tolist()
            # Cloned: a view would keep the dense copy of a packed weight alive.
            vectors |= {(ffn.layer, index): values[:, index].clone().to(lens.device) for index in best}
            sub_updates = [_sub_update(effects, base, ffn.layer, position, index) for index in best]
            effect = float(of_layer[position].sum())
            rows.append({"layer": ffn.layer, "position": position, "effect": effect, "sub_updates": sub_updates})
    # All vectors at once, so that the head is read once.
    tokens = dict(zip(vectors, lens.best_tokens(torch.stack(list(vectors.values())), top_k), strict=True))
    for row in rows:
        for update in row["sub_updates"]:
            update["tokens"] = tokens[row["layer"], update["index"]]
    targets = [{"id": token, "token": lens.text(token)} for token in effects.targets]
    found = []
    for position in chosen:
        parts = {name: float(value[position]) for name, value in effects.parts.items()}
        logit = float(effects.logit[position])
        figures = {
            "logit": logit,
            "model_logit": float(effects.run.logits[position, effects.targets[position]]),
            "base_logit": None if base is None else float(base.logit[position]),
            **parts,
            "remainder": logit - sum(parts.values()),
        }
        place = {"position": position, "token": lens.text(ids[position]), "target": targets[position]}
        found.append(place | figures)
    return {"tokens": [lens.text(token) for token in ids], "target": targets[-1], "positions": found, "layers": rows}


def _sub_update(effects: Effects, base: Effects | None, layer: int, position: int, index: int) -> dict[str, Any]:
    def number(by_layer: dict[int, Tensor]) -> float | None:
        return float(by_layer[layer][position, index]) if layer in by_layer else None

    return {
        "index": index,
        "weight": number(effects.run.weights),
        "relevance": number(effects.relevance),
        "gated": number(effects.gated),
        "effect": number(effects.sub_updates),
        "base_weight": number(base.run.weights if base else {}),
        "base_effect": number(base.sub_updates if base else {}),
    }
