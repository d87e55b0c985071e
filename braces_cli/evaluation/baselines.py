"""Other ways to steer by the same attribute, for a sweep that measures them side by side.

    prompting    "Write something cheerful:" in front of each prompt; at s = -1 the opposite's name, or "not cheerful"
    difference   the difference of means of the attribute's pairs at the layers' outputs, added there
    pca          the first principal component of the pairs' differences there, added there

The last two push the layers that the attribute pushes without training, at s = 1 by the same share of the residual
norm. All of them steer the bare base: an adapter is off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.build import description_pairs
from braces_cli.core.attributes.directions import Pair, Passage, pair_states, reduce_pairs
from braces_cli.core.attributes.pooling import STEERING_SHARE, residual_norms
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.attributes.words import OPPOSITES, REFERENCE, built_in
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.structure import add_to_output
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation.sweep import Method

# Rivals that add a direction -> how it is made from pairs.
_REDUCTIONS = {"difference": "mean", "pca": "pca"}


def baseline_methods(
    session: Session,
    names: Sequence[str],
    attribute: Attribute,
    strengths: Sequence[float],
    layers: Collection[int] | None = None,
    report: Report = silent,
) -> list[Method]:
    """The rivals called `names` at the strengths of the sweep; prompting has s = 1 and s = -1 only, where asked for.

    Raises:
        ConfigError: a direction is wanted, and the attribute does not say what pairs it is made of.
    """
    off = partial(_off, session)
    methods = []
    directions = [name for name in names if name in _REDUCTIONS]
    states = pair_states(session, contrast_pairs(attribute), captured="output", report=report) if directions else None
    for name in names:
        if name in _REDUCTIONS:
            assert states is not None
            vectors = _vectors(attribute, _norms(session), reduce_pairs(states, _REDUCTIONS[name]), layers)
            methods.append(Method(name, strengths, partial(_steered, session, vectors)))
        else:
            signs = [sign for sign in (1.0, -1.0) if any(s * sign > 0 for s in strengths)]
            methods.append(Method(name, signs, lambda s: off(), partial(_instructed, attribute.name)))
    return methods


def contrast_pairs(attribute: Attribute) -> list[Pair]:
    """The pairs that an attribute is made of: those of its descriptions, else its words against the opposite's (the
    neutral ones where it has no opposite).

    Raises:
        ConfigError: it was built from texts, which its file does not hold.
    """
    provenance = attribute.provenance
    if "describe" in provenance:
        return description_pairs(provenance["describe"], provenance["against"], provenance["chat_template"])
    if not attribute.words:
        hint = "A direction needs an attribute of words or descriptions; --baselines prompting works with any."
        raise ConfigError(f"`{attribute.name}` does not hold what it was built from", where="--baselines", hint=hint)
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


def _norms(session: Session) -> Tensor:
    """Median norm of the residual stream behind each layer, where these vectors are added: (layers,)."""
    with _off(session):
        return residual_norms(session.base.model, session.base.tokenizer, session.ffns)


def _vectors(
    attribute: Attribute, norms: Tensor, directions: Tensor, layers: Collection[int] | None
) -> dict[int, Tensor]:
    """What s = 1 adds behind each layer."""
    requested = attribute.effective_layers if layers is None else layers
    share = STEERING_SHARE / len(attribute.effective_layers)
    rows = [row for row, layer in enumerate(attribute.layers) if layer in requested]
    return {attribute.layers[row]: share * float(norms[row]) * F.normalize(directions[row], dim=0) for row in rows}


def _off(session: Session) -> AbstractContextManager[Any]:
    return nullcontext() if session.adapter is None else session.adapter.disabled()


@contextmanager
def _steered(session: Session, vectors: dict[int, Tensor], s: float) -> Iterator[None]:
    stack = layer_stack(session.base.model)[1]
    with ExitStack() as handles:
        handles.enter_context(_off(session))
        for layer, vector in vectors.items():
            handles.callback(add_to_output(stack[layer], s * vector).remove)
        yield
