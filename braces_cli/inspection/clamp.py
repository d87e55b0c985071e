"""Clamped neurons: neuron j of layer l has the activation weight w_lj = value at every position, for every input.

An adapter still adds g r_lj. The value can be a percentile of the neuron's activation weights over texts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from braces_cli.core.adapter.model import Session
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.load import input_device
from braces_cli.core.models.tokenize import Encoded, by_length, context_length, pad_right
from braces_cli.core.progress import Report, silent
from braces_cli.data.dataset import Reading, iterate
from braces_cli.inspection.trace import prompt_ids
from braces_cli.inspection.vocabulary import LogitLens, check_indices, plain_ffns

_FORM = re.compile(r"([0-9]{1,18}):([0-9]{1,18})=(p?)([^=]+)")
# Maximum number of tokens per row of the texts for percentiles, and rows per batch.
_MAX_LENGTH = 512
_BATCH = 8


@dataclass(frozen=True)
class Clamp:
    """Neuron `index` of `layer` clamped at `value`; with a percentile, `resolve_percentiles` sets the value."""

    layer: int
    index: int
    value: float
    percentile: float | None = None

    def as_row(self) -> dict[str, Any]:
        """`{layer, index, value}`, and `percentile` if there is one."""
        row = {"layer": self.layer, "index": self.index, "value": self.value}
        return row if self.percentile is None else row | {"percentile": self.percentile}


def parse_clamp(text: str) -> Clamp:
    """Parse LAYER:INDEX=VALUE or LAYER:INDEX=pPERCENTILE.

    Raises:
        ConfigError: the text has another form, the value is not finite, or the percentile is not from 0 to 100.
    """
    match = _FORM.fullmatch(text.strip())
    try:
        value = float(match[4]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value):
        hint = "Such as 3:89=2.5 or 0:7=-1, or 3:89=p99.9 for a percentile."
        raise ConfigError(f"`{text}` is not LAYER:INDEX=VALUE", where="clamp", hint=hint)
    layer, index = int(match[1]), int(match[2])
    if not match[3]:
        return Clamp(layer, index, value)
    if not 0 <= value <= 100:
        raise ConfigError(f"no percentile {value:g}", where="clamp", hint="Give p0 to p100.")
    return Clamp(layer, index, 0.0, percentile=value)


def check_clamps(ffns: Sequence[FFN], clamps: Sequence[Clamp]) -> None:
    """Raise ConfigError if the model does not have a neuron, or a neuron has two clamps."""
    by_layer = {ffn.layer: ffn for ffn in ffns}
    neurons = [(clamp.layer, clamp.index) for clamp in clamps]
    for layer, index in neurons:
        if layer not in by_layer:
            hint = f"The layers are {min(by_layer)} to {max(by_layer)}."
            raise ConfigError(f"no feed-forward layer {layer}", where="clamp", hint=hint)
        check_indices(by_layer[layer], [index], "clamp")
        if neurons.count((layer, index)) > 1:
            raise ConfigError(f"{layer}:{index} is named twice", where="clamp", hint="Give it one value.")


@contextmanager
def clamped(ffns: Sequence[FFN], clamps: Sequence[Clamp]) -> Iterator[None]:
    """Clamp the neurons inside the `with` block."""
    by_layer: dict[int, list[Clamp]] = defaultdict(list)
    for clamp in clamps:
        by_layer[clamp.layer].append(clamp)

    def set_weights(held: Sequence[Clamp]) -> Any:
        indices = [clamp.index for clamp in held]
        values = torch.tensor([clamp.value for clamp in held])

        def hook(module: nn.Module, args: tuple) -> tuple:
            weights: Tensor = args[0].clone()
            weights[..., indices] = values.to(weights)
            return (weights, *args[1:])

        return hook

    with ExitStack() as handles:
        for ffn in ffns:
            if ffn.layer in by_layer:
                handles.callback(ffn.value.register_forward_pre_hook(set_weights(by_layer[ffn.layer])).remove)
        yield


def clamp_prompt(
    session: Session,
    lens: LogitLens,
    prompt: str,
    clamps: Sequence[Clamp],
    *,
    tokens: Sequence[int] = (),
    top_k: int = 10,
) -> dict[str, Any]:
    """Compare a prompt without and with clamps.

    Returns:
        `{prompt, kl, kl_mean, log_likelihood_before, log_likelihood_after, tokens}`. `tokens` are `{id, token, before,
        after, ratio}`, the probabilities of the next token: for the requested tokens, then for those whose probability
        rises most. `kl` is KL(before || after) in nats at the last position, `kl_mean` the mean over positions. The
        likelihoods are of the prompt, in nats, None if it has one token.
    """
    model = session.base.model
    ids = torch.tensor([prompt_ids(session, prompt, "--prompt")], device=input_device(model))

    def log_probabilities() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(dim=-1)

    def likelihood(found: Tensor) -> float | None:
        following = ids[0, 1:, None].to(found.device)
        return float(found[:-1].gather(1, following).sum()) if len(following) else None

    before = log_probabilities()
    with clamped(plain_ffns(session.ffns), clamps):
        after = log_probabilities()
    kl = (before.exp() * (before - after)).sum(dim=-1)
    rise = after[-1].exp() - before[-1].exp()
    # Sorted, not topk: of equal numbers the lower token comes first.
    rising = rise.sort(descending=True, stable=True).indices[:top_k].tolist()
    rows = []
    for token in dict.fromkeys([*tokens, *rising]):
        old, new = float(before[-1, token]), float(after[-1, token])
        ratio = math.exp(min(new - old, 700.0))
        rows.append(
            {"id": token, "token": lens.text(token), "before": math.exp(old), "after": math.exp(new), "ratio": ratio}
        )
    return {
        "prompt": prompt,
        "kl": float(kl[-1]),
        "kl_mean": float(kl.mean()),
        "log_likelihood_before": likelihood(before),
        "log_likelihood_after": likelihood(after),
        "tokens": rows,
    }


def read_texts(session: Session, names: Sequence[str], limit: int) -> list[Encoded]:
    """Return the first `limit` rows that have a text, encoded.

    Raises:
        DataError: the rows cannot be read, or no row has a text.
    """
    tokenizer = session.base.tokenizer
    how = Reading(tokenizer, min(_MAX_LENGTH, context_length(session.base.model.config, tokenizer)), streaming=True)
    found = list(islice((row.tokens for row in iterate(names, how) if row.tokens is not None), limit))
    if not found:
        raise DataError("no row has a text", where=", ".join(names), hint="Give rows with `text`.")
    return found


def activation_weights(
    session: Session, neurons: Sequence[tuple[int, int]], texts: Sequence[Encoded], report: Report = silent
) -> Tensor:
    """Activation weights w (positions, neurons) in float32 of (layer, index) pairs at every position of the texts.

    w does not include an adapter's g r, but the adapter in lower layers has its effect.
    """
    model = session.base.model
    device = input_device(model)
    pad = session.base.tokenizer.pad_token_id or 0
    requested = {layer: [index for each, index in neurons if each == layer] for layer, _ in neurons}
    seen: dict[int, Tensor] = {}
    parts: list[Tensor] = []

    def record(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            seen[layer] = args[0][..., requested[layer]].detach().float().to(device)

        return hook

    with ExitStack() as handles, torch.no_grad():
        for ffn in plain_ffns(session.ffns):
            if ffn.layer in requested:
                handles.callback(ffn.value.register_forward_pre_hook(record(ffn.layer)).remove)
        done = 0
        for group in by_length(texts, _BATCH):
            batch = pad_right([texts[index] for index in group], pad)
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            # Some FFNs receive rows and positions as one dimension.
            flat = {layer: value.reshape(-1, value.shape[-1])[mask.bool().flatten()] for layer, value in seen.items()}
            columns = [flat[layer][:, requested[layer].index(index)] for layer, index in neurons]
            parts.append(torch.stack(columns, dim=1).cpu())
            report("computing percentiles", done := done + len(group), len(texts))
    return torch.cat(parts)


def resolve_percentiles(
    session: Session, clamps: Sequence[Clamp], texts: Sequence[Encoded], report: Report = silent
) -> list[Clamp]:
    """Set the values of percentile clamps, with linear interpolation, over all positions of `texts`."""
    chosen = [clamp for clamp in clamps if clamp.percentile is not None]
    neurons = [(clamp.layer, clamp.index) for clamp in chosen]
    weights = activation_weights(session, neurons, texts, report).double().numpy()
    # numpy, because torch.quantile takes at most 16 million numbers.
    values = {clamp: float(np.percentile(weights[:, i], clamp.percentile or 0.0)) for i, clamp in enumerate(chosen)}
    return [replace(clamp, value=values[clamp]) if clamp in values else clamp for clamp in clamps]
