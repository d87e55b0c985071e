"""What a high weight is for a neuron: percentiles of its own activation weights over texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from braces_cli.core.models.loading import input_device
from braces_cli.core.models.padding import by_length, pad_right
from braces_cli.core.models.tokenization import Encoded, context_length
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import DataError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.data.examples import Reading, iterate
from braces_cli.inspection.ffn_weights import plain_ffns
from braces_cli.inspection.neuron_clamping import Clamp

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
