"""From a vector in the residual stream to vocabulary scores: final norm, then LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.errors import ModelError
from braces_cli.core.ffn import layer_stack


def final_norm(model: nn.Module) -> nn.Module:
    """The norm behind the last layer: the last norm among the siblings of the stack of layers, identity if none."""
    stack = layer_stack(model)[0]
    parent = model.get_submodule(stack.rpartition(".")[0])
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else nn.Identity()


def readout(model: Any) -> Callable[[Tensor], Tensor]:
    """A function from vectors (n, d) to scores (n, vocabulary), in float32.

    Raises:
        ModelError: the model has no LM head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no LM head", hint="Give a causal language model.")
    norm = final_norm(model)
    stack = layer_stack(model)[0]
    parent = model.get_submodule(stack.rpartition(".")[0])
    # OPT-350m alone has embeddings narrower than its layers, and a projection down to them.
    narrow = getattr(parent, "project_out", None)

    def scores(vectors: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = norm(vectors)
            result: Tensor = head(hidden if narrow is None else narrow(hidden))
        return result.float()

    return scores
