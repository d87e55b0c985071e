"""Baselines for a sweep: other methods to steer by the same attribute.

    prompting    "Write something cheerful:" before each prompt; at s = -1 the name of the opposite, or "not cheerful"
    difference   difference of means of the attribute's pairs at the outputs of the layers, added there
    pca          first principal component of the differences of the pairs there, added there

The last two steer the layers of the untrained steering vector, at s = 1 by the same share of the residual norm. All
methods steer the base without its adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.build import description_pairs
from braces_cli.core.attributes.directions import Pair, Passage, pair_states, reduce_pairs
from braces_cli.core.attributes.pooling import residual_norms
from braces_cli.core.attributes.vector import STEERING_SHARE, Attribute
from braces_cli.core.attributes.words import OPPOSITES, REFERENCE, built_in
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.structure import add_to_output
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation.sweep import Method
from braces_cli.evaluation.systems import bare

# Baseline that adds a direction -> reduction of the pairs.
_REDUCTIONS = {"difference": "mean", "pca": "pca"}


def baseline_methods(
    session: Session,
    names: Sequence[str],
    attribute: Attribute,
    strengths: Sequence[float],
    layers: Collection[int] | None = None,
    report: Report = silent,
) -> list[Method]:
    """Return the baselines `names` at the strengths of the sweep; prompting only has s = 1 and s = -1."""
    methods = []
    directions = [name for name in names if name in _REDUCTIONS]
    if directions:
        states = pair_states(session, contrast_pairs(attribute), captured="output", report=report)
        with bare(session):
            norms = residual_norms(session.base.model, session.base.tokenizer, session.ffns)
        # What s = 1 adds after each layer.
        steered_layers = attribute.effective_layers if layers is None else layers
        share = STEERING_SHARE / len(attribute.effective_layers)
        rows = [row for row, layer in enumerate(attribute.layers) if layer in steered_layers]
    for name in names:
        if name in _REDUCTIONS:
            reduced = reduce_pairs(states, _REDUCTIONS[name])
            vectors = {
                attribute.layers[row]: share * float(norms[row]) * F.normalize(reduced[row], dim=0) for row in rows
            }
            methods.append(Method(name, strengths, partial(_steered, session, vectors)))
        else:
            signs = [sign for sign in (1.0, -1.0) if any(s * sign > 0 for s in strengths)]
            methods.append(Method(name, signs, lambda s: bare(session), partial(_instructed, attribute.name)))
    return methods


def contrast_pairs(attribute: Attribute) -> list[Pair]:
    """Return the pairs of an attribute: its descriptions, else its words and those of the opposite (or neutral)."""
    provenance = attribute.provenance
    if "describe" in provenance:
        return description_pairs(provenance["describe"], provenance["against"], provenance["chat_template"])
    if not attribute.words:
        hint = "A direction needs an attribute of words or descriptions; --baselines prompting works with any."
        raise ConfigError(
            f"`{attribute.name}` was built from texts, which its file does not have", where="--baselines", hint=hint
        )
    other = built_in()[OPPOSITES.get(attribute.name, REFERENCE)]
    count = max(len(attribute.words), len(other))
    return [
        Pair(Passage(f" {attribute.words[k % len(attribute.words)]}"), Passage(f" {other[k % len(other)]}"))
        for k in range(count)
    ]


def _instructed(name: str, prompts: Sequence[str], s: float) -> list[str]:
    words = name.replace("_", " ")
    if s < 0:
        words = OPPOSITES.get(name, f"not {words}")
    return [f"Write something {words}: {prompt}" for prompt in prompts]


@contextmanager
def _steered(session: Session, vectors: dict[int, Tensor], s: float) -> Iterator[None]:
    stack = layer_stack(session.base.model)[1]
    with bare(session), ExitStack() as handles:
        for layer, vector in vectors.items():
            handles.callback(add_to_output(stack[layer], s * vector).remove)
        yield
