"""Hold neurons at a value and see what the model says then.

A clamped neuron j of layer l has the activation weight w_lj = value at every position, whatever the FFN's input; an
adapter's g r_lj is still added on top.

What a high weight is for a neuron: percentiles of its own activation weights over texts.
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
from braces_cli.core.models.tokenize import Encoded, by_length, context_length, encode, pad_right
from braces_cli.core.progress import Report, silent
from braces_cli.data.dataset import Reading, iterate
from braces_cli.inspection.vocabulary import TokenTexts, TopK, check_indices, plain_ffns

_FORM = re.compile(r"([0-9]{1,18}):([0-9]{1,18})=(p?)([^=]+)")


@dataclass(frozen=True)
class Clamp:
    """Neuron `index` of `layer` held at `value`.

    Where a percentile is given, the value is 0 until `activation_percentiles.resolve_percentiles` has computed it.
    """

    layer: int
    index: int
    value: float
    percentile: float | None = None

    def as_row(self) -> dict[str, Any]:
        """`{layer, index, value}`, and `percentile` where the value is one."""
        row = {"layer": self.layer, "index": self.index, "value": self.value}
        return row if self.percentile is None else row | {"percentile": self.percentile}


def parse_clamp(text: str) -> Clamp:
    """Read LAYER:INDEX=VALUE, or LAYER:INDEX=pPERCENTILE.

    Raises:
        ConfigError: it is not of that form, the value is no finite number, or the percentile none from 0 to 100.
    """
    match = _FORM.fullmatch(text.strip())
    try:
        value = float(match[4]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value):
        hint = "Such as 3:89=2.5 or 0:7=-1, or 3:89=p99.9 for a percentile."
        raise ConfigError(f"`{text}` is no LAYER:INDEX=VALUE", where="clamp", hint=hint)
    layer, index = int(match[1]), int(match[2])
    if not match[3]:
        return Clamp(layer, index, value)
    if not 0 <= value <= 100:
        raise ConfigError(f"no percentile {value:g}", where="clamp", hint="There is p0 to p100.")
    return Clamp(layer, index, 0.0, percentile=value)


def check_clamps(ffns: Sequence[FFN], clamps: Sequence[Clamp]) -> None:
    """Hold clamps to the model.

    Raises:
        ConfigError: a layer or a neuron that is not there, or one that is named twice.
    """
    by_layer = {ffn.layer: ffn for ffn in ffns}
    for number, clamp in enumerate(clamps):
        if clamp.layer not in by_layer:
            hint = f"There is one in layers {min(by_layer)} to {max(by_layer)}."
            raise ConfigError(f"no feed-forward layer {clamp.layer}", where="clamp", hint=hint)
        check_indices(by_layer[clamp.layer], [clamp.index], "clamp")
        if any((c.layer, c.index) == (clamp.layer, clamp.index) for c in clamps[:number]):
            raise ConfigError(f"{clamp.layer}:{clamp.index} is named twice", where="clamp", hint="Give it one value.")


@contextmanager
def clamped(ffns: Sequence[FFN], clamps: Sequence[Clamp]) -> Iterator[None]:
    """Hold the neurons inside the `with` block; afterwards the model is what it was.

    Raises:
        ConfigError: see `check_clamps`.
    """
    check_clamps(ffns, clamps)
    clamps_by_layer: dict[int, list[Clamp]] = defaultdict(list)
    for clamp in clamps:
        clamps_by_layer[clamp.layer].append(clamp)
    with ExitStack() as handles:
        for ffn in ffns:
            if ffn.layer in clamps_by_layer:
                handles.callback(ffn.value.register_forward_pre_hook(_holder(clamps_by_layer[ffn.layer])).remove)
        yield


def _holder(clamps: Sequence[Clamp]) -> Any:
    indices = [clamp.index for clamp in clamps]
    values = [clamp.value for clamp in clamps]

    def hook(module: nn.Module, args: tuple) -> tuple:
        weights: Tensor = args[0].clone()
        weights[..., indices] = torch.tensor(values).to(weights)
        return (weights, *args[1:])

    return hook


def distributions(session: Session, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of the next token behind each position, (positions, vocabulary), float32."""
    device = input_device(session.base.model)
    with torch.no_grad():
        logits = session.base.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats of log-probabilities (..., vocabulary), (...)."""
    return (before.exp() * (before - after)).sum(dim=-1)


def prompt_ids(session: Session, prompt: str) -> list[int]:
    """Tokens of a prompt.

    Raises:
        ConfigError: it does not fit.
    """
    ids = encode(session.base.tokenizer, prompt).ids
    max_prompt_length = context_length(session.base.model.config, session.base.tokenizer)
    if len(ids) > max_prompt_length:
        raise ConfigError(
            f"a prompt has {len(ids)} tokens", where="--prompt", hint=f"There is room for {max_prompt_length}."
        )
    return ids


def clamp_prompt(
    session: Session, prompt: str, clamps: Sequence[Clamp], *, tokens: Sequence[int] = (), top_k: int = 10
) -> dict[str, Any]:
    """What clamps do to one prompt: `{prompt, kl, kl_mean, log_likelihood_before, log_likelihood_after, tokens}`.

    `tokens` are `{id, token, before, after, ratio}`: the ones asked for, then those whose probability of coming next
    rises most; `kl` is KL(before || after) in nats behind the last position, `kl_mean` over all positions; the
    likelihoods are of the prompt itself, in nats, None where it has a single token.
    """
    ids = prompt_ids(session, prompt)
    before = distributions(session, ids)
    with clamped(plain_ffns(session.ffns), clamps):
        after = distributions(session, ids)
    rise = after[-1].exp() - before[-1].exp()
    top = TopK(1, min(top_k, len(rise)), rise.device)
    top.add(rise[None], 0)
    texts = TokenTexts(session.base.tokenizer)
    shown = list(dict.fromkeys([*tokens, *top.result()[1][0].tolist()]))
    kl = divergence(before, after)
    return {
        "prompt": prompt,
        "kl": float(kl[-1]),
        "kl_mean": float(kl.mean()),
        "log_likelihood_before": _likelihood(before, ids),
        "log_likelihood_after": _likelihood(after, ids),
        "tokens": [_change(t, texts[t], before[-1], after[-1]) for t in shown],
    }


def _change(token: int, text: str, before: Tensor, after: Tensor) -> dict[str, Any]:
    old, new = float(before[token]), float(after[token])
    ratio = math.exp(min(new - old, 700.0))
    return {"id": token, "token": text, "before": math.exp(old), "after": math.exp(new), "ratio": ratio}


def _likelihood(log_probabilities: Tensor, ids: Sequence[int]) -> float | None:
    if len(ids) < 2:
        return None
    following = torch.tensor(list(ids[1:]), device=log_probabilities.device)
    return float(log_probabilities[:-1].gather(1, following[:, None]).sum())


TEXTS = 1000  # rows that are read unless told otherwise
_MAX_LENGTH = 512  # tokens of a row: enough positions, in batches that fit
_BATCH = 8


def read_texts(session: Session, names: Sequence[str], limit: int = TEXTS) -> list[Encoded]:
    """The first `limit` rows that hold a text, as the model reads them.

    Raises:
        DataError: see `read_rows`; or no row holds a text.
    """
    tokenizer = session.base.tokenizer
    how = Reading(tokenizer, min(_MAX_LENGTH, context_length(session.base.model.config, tokenizer)), streaming=True)
    found = list(islice((row.tokens for row in iterate(names, how) if row.tokens is not None), limit))
    if not found:
        raise DataError("no row holds a text", where=", ".join(names), hint="Give rows with `text`.")
    return found


def activation_weights(
    session: Session, neurons: Sequence[tuple[int, int]], texts: Sequence[Encoded], report: Report = silent
) -> Tensor:
    """Activation weights w (positions, neurons) in float32 of (layer, index) pairs at every position of the texts.

    An adapter is as it is: its g r is not part of w, but what it does to lower layers shows.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    device = input_device(model)
    pad = tokenizer.pad_token_id or 0
    seen: dict[int, Tensor] = {}
    parts: list[Tensor] = []

    def keep(layer: int, indices: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            seen[layer] = args[0][..., indices].detach().float().to(device)

        return hook

    requested = {layer: [j for at, j in neurons if at == layer] for layer, _ in neurons}
    with ExitStack() as handles, torch.no_grad():
        for ffn in plain_ffns(session.ffns):
            if ffn.layer in requested:
                hook = keep(ffn.layer, requested[ffn.layer])
                handles.callback(ffn.value.register_forward_pre_hook(hook).remove)
        done = 0
        for group in by_length(texts, _BATCH):
            batch = pad_right([texts[index] for index in group], pad)
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            # An FFN may see (rows, positions) as one axis.
            flat = {layer: value.reshape(-1, value.shape[-1])[mask.bool().flatten()] for layer, value in seen.items()}
            columns = [flat[layer][:, requested[layer].index(index)] for layer, index in neurons]
            parts.append(torch.stack(columns, dim=1).cpu())
            report("taking percentiles", done := done + len(group), len(texts))
    return torch.cat(parts)


def resolve_percentiles(
    session: Session, clamps: Sequence[Clamp], texts: Sequence[Encoded], report: Report = silent
) -> list[Clamp]:
    """The clamps with a value each: that of a percentile, linear between two weights, over all positions of `texts`."""
    some = [(clamp, clamp.percentile) for clamp in clamps if clamp.percentile is not None]
    neurons = [(clamp.layer, clamp.index) for clamp, _ in some]
    weights = activation_weights(session, neurons, texts, report).double().numpy()
    # Not torch.quantile, which takes 16 million numbers at most.
    values = {clamp: float(np.percentile(weights[:, column], p)) for column, (clamp, p) in enumerate(some)}
    return [replace(clamp, value=values[clamp]) if clamp in values else clamp for clamp in clamps]
