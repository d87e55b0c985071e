"""Measure c of each layer, the constant that makes relevance independent of how the base is parametrised.

    c = REACH rms(FFN(h)) / rms(W_V W_V^T h)        for relevance to the output W_V W_V^T FFN(h) in the denominator

over the tokens of some texts without the first, on which some bases put outputs hundreds of times larger than on others
(with it, layer 11 of SmolLM2 would have 200 times the c); in a mixture of experts, over the pairs of a token and an
expert that it is sent to, before the router's weights.

Bases that compute the same function with W_V and the up projection, or the norm's weight and the FFN's inputs, scaled
against each other have the same side path.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.gram import gram
from braces_cli.core.adapter.model import hook_ffn
from braces_cli.core.errors import ModelError, first_line
from braces_cli.core.models.ffn import FFN, Experts, MixtureFFN, expert_outputs, routing
from braces_cli.core.models.load import input_device
from braces_cli.core.models.weights import Values

# rms of the side path over rms of the FFN's output, at g = 1 and R = I, without 1 / sqrt(d_r).
REACH = 32.0


def measure_scales(
    model: Any, ffns: Sequence[FFN | MixtureFFN], texts: Sequence[Sequence[int]], relevance_to: str = "input"
) -> list[float]:
    """c of each FFN over `texts` (token ids); 1 if the FFN or W_V is zero, or a number is not finite."""
    meters = [_Meter(relevance_to) for _ in ffns]
    with ExitStack() as stack:
        for ffn, meter in zip(ffns, meters, strict=True):
            for part in ffn.parts:
                if isinstance(part, Experts) and not part.presorted:
                    handles = [meter.watch_experts(part)]
                else:
                    handles = hook_ffn(part, meter)
                for handle in handles:
                    stack.callback(handle.remove)
        run_texts(model, texts)
    return [meter.scale for meter in meters]


def run_texts(model: Any, texts: Sequence[Sequence[int]]) -> None:
    """Run the model on one text at a time, without padding."""
    device, was_training = input_device(model), model.training
    model.eval()
    try:
        with torch.no_grad():
            for ids in texts:
                model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    except (TypeError, ValueError) as error:
        # An assistant of Gemma 4, for example, needs the keys of another model.
        message = f"{type(model).__name__} does not run on tokens alone: {first_line(error)}"
        raise ModelError(message, hint="Use another base.") from error
    finally:
        model.train(was_training)


class _Meter:
    """Sums of squares of an FFN's output and of W_V W_V^T times the query, with the methods that `hook_ffn` calls."""

    enabled = True

    def __init__(self, relevance_to: str) -> None:
        self.relevance_to = relevance_to
        self._output = 0.0
        self._path = 0.0

    @property
    def scale(self) -> float:
        """c."""
        found = REACH * math.sqrt(self._output / self._path) if self._output > 0 and self._path > 0 else 1.0
        return found if 0 < found < math.inf else 1.0

    def __call__(self, output: Tensor, query: Tensor, values: Values) -> Tensor:
        self._add(output.reshape(-1, output.shape[-1])[1:], query.reshape(-1, query.shape[-1])[1:], values)
        return output

    def by_expert(self, output: Tensor, query: Tensor, values: Tensor) -> Tensor:
        """Measure experts with presorted tokens (experts * n, d); a row of zeros is a token not sent to them."""
        rows = output.reshape(len(values), -1, output.shape[-1])
        for each, tokens, value in zip(rows[:, 1:], query.reshape(rows.shape)[:, 1:], values, strict=True):
            sent = (tokens != 0).any(dim=-1)
            self._add(each[sent], tokens[sent], value)
        return output

    def watch_experts(self, part: Experts) -> Any:
        """Measure routed experts with weights in one tensor."""

        def around(module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
            h, index, _ = routing(args, kwargs)
            outputs = expert_outputs(module, args, kwargs, index)
            queries = outputs if self.relevance_to == "output" else h.unsqueeze(1).expand_as(outputs)
            outputs, queries, index = outputs[1:], queries[1:], index[1:]
            for expert, values in enumerate(part.value_matrix()):
                self._add(outputs[index == expert], queries[index == expert], values)

        return part.module.register_forward_hook(around, with_kwargs=True)

    def _add(self, output: Tensor, query: Tensor, values: Values) -> None:
        rows = query.detach().to(torch.promote_types(query.dtype, torch.float32))
        self._output += _squares(output.detach())
        self._path += _squares(gram(values, rows.to(output.device).mT))


def _squares(tensor: Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=wide)) ** 2
