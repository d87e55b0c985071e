"""How large what the adapter adds is beside the FFN's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.method.adapter import Adapter, hook_ffn
from braces_cli.core.method.relevance import RelevanceModule
from braces_cli.core.method.relevance_scale import run_texts
from braces_cli.core.models.tokenization import Encoded


def side_path_shares(adapter: Adapter, examples: Sequence[Encoded]) -> list[float]:
    """For each layer |B A h| / |FFN(h)|, the median over the tokens of `examples`, without any attribute."""
    adapter.condition(None)
    recorders = [_TermRecorder(adapter_layer) for _, adapter_layer in adapter.adapted_ffns]
    with adapter.disabled(), ExitStack() as stack:
        for (ffn, _), recorder in zip(adapter.adapted_ffns, recorders, strict=True):
            for handle in (handle for part in ffn.parts for handle in hook_ffn(part, recorder)):
                stack.callback(handle.remove)
        run_texts(adapter.model, [example.ids for example in examples])
    return [float(torch.cat(found.ratios).median()) if found.ratios else 0.0 for found in recorders]


class _TermRecorder:
    """Does what a relevance module does, and keeps |term| / |output| of every row where the output is not zero."""

    enabled = True

    def __init__(self, adapter_layer: RelevanceModule) -> None:
        self._adapter_layer = adapter_layer
        self.ratios: list[Tensor] = []

    def __call__(self, output: Tensor, *rest: Any) -> Tensor:
        return self._add(self._adapter_layer, output, *rest)

    def routed(self, output: Tensor, *rest: Any) -> Tensor:
        return self._add(self._adapter_layer.routed, output, *rest)

    def by_expert(self, output: Tensor, *rest: Any) -> Tensor:
        return self._add(self._adapter_layer.by_expert, output, *rest)

    def _add(self, add: Callable[..., Tensor], output: Tensor, *rest: Any) -> Tensor:
        # Added to zero: the difference of two bfloat16 sums would be rounding.
        term = add(torch.zeros_like(output), *rest).detach().float().flatten(0, -2).norm(dim=-1)
        size = output.detach().float().flatten(0, -2).norm(dim=-1)
        self.ratios.append((term / size)[size > 0].cpu())
        return add(output, *rest)
