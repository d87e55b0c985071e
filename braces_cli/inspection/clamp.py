"""Clamped neurons: neuron j of layer l has the activation weight w_lj = value at every position, for every input.

An adapter still adds g r_lj. The value can be a percentile of the neuron's activation weights over texts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
from braces_cli.inspection.vocabulary import LogitLens, plain_ffns

_FORM = re.compile(r"([0-9]{1,9}):([0-9]{1,9})=(p?)([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?)")
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


def parse_clamp(text: str) -> Clamp:
    """Parse LAYER:INDEX=VALUE or LAYER:INDEX=pPERCENTILE.

    Raises:
        ConfigError: the text has another form, or the percentile is not from 0 to 100.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None or (match[3] and not 0 <= float(match[4]) <= 100):
        hint = "Such as 3:89=2.5 or 0:7=-1, or 3:89=p99.9 for a percentile, p0 to p100."
        raise ConfigError(f"`{text}` is not LAYER:INDEX=VALUE", where="clamp", hint=hint)
    layer, index, value = int(match[1]), int(match[2]), float(match[4])
    return Clamp(layer, index, 0.0, percentile=value) if match[3] else Clamp(layer, index, value)


def check_clamps(ffns: Sequence[FFN], clamps: Sequence[Clamp]) -> None:
    """Raise ConfigError if the model does not have a neuron, or a neuron has two clamps."""
    sizes = {ffn.layer: ffn.value_vectors for ffn in ffns}
    neurons = [(clamp.layer, clamp.index) for clamp in clamps]
    for layer, index in neurons:
        if layer not in sizes:
            hint = f"The layers are {min(sizes)} to {max(sizes)}."
            raise ConfigError(f"no feed-forward layer {layer}", where="clamp", hint=hint)
        if index >= sizes[layer]:
            hint = f"Layer {layer} has value vectors 0 to {sizes[layer] - 1}."
            raise ConfigError(f"no value vector {index}", where="clamp", hint=hint)
        if neurons.count((layer, index)) > 1:
            raise ConfigError(f"{layer}:{index} is named twice", where="clamp", hint="Give it one value.")


@contextmanager
def clamped(ffns: Sequence[FFN], clamps: Sequence[Clamp]) -> Iterator[None]:
    """Clamp the neurons inside the `with` block."""
    values = {ffn.layer: ffn.value for ffn in ffns}

    def set_weight(module: nn.Module, args: tuple, clamp: Clamp) -> tuple:
        weights: Tensor = args[0].clone()
        weights[..., clamp.index] = clamp.value
        return (weights, *args[1:])

    with ExitStack() as handles:
        for clamp in clamps:
            handle = values[clamp.layer].register_forward_pre_hook(partial(set_weight, clamp=clamp))
            handles.callback(handle.remove)
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
        `{prompt, kl, kl_mean, kl_noise, tokens}`. `tokens` are `{id, token, before, after, ratio}`, the probabilities
        of the next token: for the requested tokens, then for those whose probability rises most. `kl` is
        KL(before || after) in nats at the last position, `kl_mean` the mean over positions, `kl_noise` that of two
        passes that differ in rounding only.
    """
    model = session.base.model
    ids = torch.tensor([prompt_ids(session, prompt, "--prompt")], device=input_device(model))

    def log_probabilities(copies: int = 1) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids.repeat(copies, 1), use_cache=False).logits[0].float().log_softmax(dim=-1)

    def divergence(one: Tensor, other: Tensor) -> Tensor:
        return (one.exp() * (one - other)).sum(dim=-1)

    before = log_probabilities()
    # In a larger batch the same sums are rounded in another order.
    noise = divergence(before, log_probabilities(copies=3))
    with clamped(plain_ffns(session.ffns), clamps):
        after = log_probabilities()
    kl = divergence(before, after)
    rise = after[-1].exp() - before[-1].exp()
    # Sorted, not topk: of equal numbers the lower token comes first.
    rising = rise.sort(descending=True, stable=True).indices[:top_k].tolist()
    rows = []
    for token in dict.fromkeys([*tokens, *rising]):
        old, new = float(before[-1, token]), float(after[-1, token])
        row = {"id": token, "token": lens.text(token), "before": math.exp(old), "after": math.exp(new)}
        rows.append(row | {"ratio": math.exp(min(new - old, 700.0))})
    found = {"kl": float(kl[-1]), "kl_mean": float(kl.mean()), "kl_noise": abs(float(noise[-1]))}
    return {"prompt": prompt, **found, "tokens": rows}


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
    session: Session, neurons: dict[int, list[int]], texts: Sequence[Encoded], report: Report = silent
) -> dict[int, Tensor]:
    """Activation weights w (positions, neurons) in float32 of some neurons of each layer, at all positions of texts.

    w does not include an adapter's g r, but the adapter in lower layers has its effect.
    """
    model = session.base.model
    device = input_device(model)
    pad = session.base.tokenizer.pad_token_id or 0
    seen: dict[int, Tensor] = {}
    parts: dict[int, list[Tensor]] = {layer: [] for layer in neurons}

    def record(module: nn.Module, args: tuple, layer: int) -> None:
        seen[layer] = args[0][..., neurons[layer]].detach().float().to(device)

    with ExitStack() as handles, torch.no_grad():
        for ffn in plain_ffns(session.ffns):
            if ffn.layer in neurons:
                handle = ffn.value.register_forward_pre_hook(partial(record, layer=ffn.layer))
                handles.callback(handle.remove)
        done = 0
        for group in by_length(texts, _BATCH):
            batch = pad_right([texts[index] for index in group], pad)
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            for layer, value in seen.items():
                # Some FFNs receive rows and positions as one dimension.
                parts[layer].append(value.reshape(-1, value.shape[-1])[mask.bool().flatten()].cpu())
            report("computing percentiles", done := done + len(group), len(texts))
    return {layer: torch.cat(values) for layer, values in parts.items()}


def resolve_percentiles(
    session: Session, clamps: Sequence[Clamp], texts: Sequence[Encoded], report: Report = silent
) -> list[Clamp]:
    """Set the values of percentile clamps, with linear interpolation, over all positions of `texts`."""
    neurons: dict[int, list[int]] = defaultdict(list)
    for clamp in clamps:
        if clamp.percentile is not None:
            neurons[clamp.layer].append(clamp.index)
    weights = activation_weights(session, neurons, texts, report)
    resolved = list(clamps)
    for number, clamp in enumerate(clamps):
        if clamp.percentile is not None:
            of_neuron = weights[clamp.layer][:, neurons[clamp.layer].index(clamp.index)].double().numpy()
            # numpy, because torch.quantile takes at most 16 million numbers.
            resolved[number] = replace(clamp, value=float(np.percentile(of_neuron, clamp.percentile)))
    return resolved
