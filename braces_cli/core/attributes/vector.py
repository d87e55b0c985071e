"""Attributes: words -> pooled FFN inputs of a base -> the hidden state h_c that steers, at every layer.

    p   = pooled(attribute) - pooled(reference)         reference: neutral words, stored beside every attribute
    h_c = p                                             (plus an MLP of p where attributes were trained: `condition`)
    pooled(words) = mean over words of the mean over each word's tokens of h, the input of the FFN

The reference is there because pooled states of any words share most of their direction. `p` depends on the attribute's
own words and the reference only, never on what else is loaded. Texts can stand in for words; their reference is then
neutral texts, because what tells texts from lone words is the same for all of them, too. Both are pooled alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.directions import (
    Item,
    Passage,
    cheapest_directions,
    default_reduction,
    text_items,
    word_items,
)
from braces_cli.core.attributes.files import FORMAT_VERSION, HEADER, read_header
from braces_cli.core.attributes.pooling import default_layers, output_norms, pool_texts, pool_words, steering_scale
from braces_cli.core.attributes.words import GRADIENT, OPPOSITES, REFERENCE, built_in, neutral_texts
from braces_cli.core.errors import ConfigError, ModelError, first_line
from braces_cli.core.files import write_tensors
from braces_cli.core.models.identity import Fingerprint, differences
from braces_cli.core.models.weights import OVERFLOW_HINT
from braces_cli.core.progress import Report, silent

_PARTS = ("hidden", "reference", "residual", "scale")
# A tensor that only some attributes have.
_DIRECTION = "direction"
# What a header's details tell of an attribute; the rest of them is for listings.
_RECORDED = ("base", "pooling", "examples", "steered_layers", "provenance")


@dataclass(frozen=True)
class Attribute:
    """One attribute of one base; all tensors in float32 on the CPU.

    Attributes:
        name: of the attribute.
        words: it was built from; none where it was built from texts.
        hidden: pooled FFN inputs of the words or texts, (layers, d).
        reference: pooled FFN inputs of the neutral words or texts, (layers, d).
        residual: median norm of the residual stream behind each layer over shipped neutral text, (layers,); over what
            the layer makes of its FFN's output, where that is not added as it is (`push_sizes.output_norms`).
        scale: what makes `scale * steering_direction` the push of s = 1 at a layer, (layers,); for steering without
            training.
        layers: decoder layer of each row.
        fingerprint: of the base.
        base: its name, as the user gave it; recorded only.
        pooling: over the tokens of each word or text, one of `core.attributes.pooling.POOLINGS`.
        examples: how many texts it was built from, 0 where it was built from words.
        steered_layers: decoder layers of the steering vector; None: the default layers.
        made: how it was made, as far as words and examples do not say it; recorded only.
        direction: what is pushed along without training, where that is not p, (layers, d).
    """

    name: str
    words: list[str]
    hidden: Tensor
    reference: Tensor
    residual: Tensor
    scale: Tensor
    layers: list[int]
    fingerprint: Fingerprint
    base: str | None = None
    pooling: str = "mean"
    examples: int = 0
    steered_layers: list[int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    direction: Tensor | None = None

    @property
    def steering_direction(self) -> Tensor:
        """Direction of the steering vector, (layers, d); p by default."""
        return self.state if self.direction is None else self.direction

    @property
    def effective_layers(self) -> list[int]:
        """Decoder layers of the steering vector."""
        return default_layers(self.layers) if self.steered_layers is None else self.steered_layers

    @property
    def state(self) -> Tensor:
        """p = pooled(words) - pooled(reference), (layers, d)."""
        return self.hidden - self.reference


def save_attributes(path: Path, attributes: Sequence[Attribute]) -> None:
    """Write attributes of one base into a file: tensors `{name}.hidden` and so on, the rest in the header."""
    tensors = {f"{each.name}.{part}": getattr(each, part) for each in attributes for part in _PARTS}
    tensors |= {f"{each.name}.{_DIRECTION}": each.direction for each in attributes if each.direction is not None}
    header = {
        "format_version": FORMAT_VERSION,
        "attributes": json.dumps({each.name: each.words for each in attributes}, ensure_ascii=False),
        "layers": json.dumps(attributes[0].layers),
        "fingerprint": json.dumps(attributes[0].fingerprint),
        "details": json.dumps({each.name: _details(each) for each in attributes}),
    }
    write_tensors(path, tensors, header)


def _details(attribute: Attribute) -> dict[str, Any]:
    """What a listing shows of an attribute besides its words, so that it need not read tensors.

    `difference` is |p| / |pooled(reference)| and `residual` the median norm of the residual stream, one a layer.
    """
    difference = attribute.state.norm(dim=-1) / attribute.reference.norm(dim=-1).clamp(min=1e-30)
    return {
        "base": attribute.base,
        "pooling": attribute.pooling,
        "examples": attribute.examples,
        "steered_layers": attribute.steered_layers,
        "provenance": attribute.provenance,
        "difference": [float(f"{value:.4g}") for value in difference.tolist()],
        "residual": [float(f"{value:.4g}") for value in attribute.residual.tolist()],
    }


def build_attribute(
    session: Session,
    name: str,
    words: Sequence[str],
    report: Report = silent,
    pooling: str = "mean",
    reduction: str | None = "mean",
) -> Attribute:
    """Pool words through the bare base; an adapter that is attached stays out of it.

    Args:
        reduction: "mean" pushes along p, "gradient" along what makes the words likelier than neutral ones; None is the
            latter, where the model lets gradients through.
    """
    neutral = built_in()[REFERENCE]
    attribute = _build(session, name, pool_words, words, neutral, report, pooling)
    return _redirected(session, attribute, reduction, lambda: word_items(session, words, neutral), report)


def built_in_attribute(
    session: Session, name: str, report: Report = silent, pooling: str = "mean", reduction: str | None = "mean"
) -> Attribute:
    """The attribute of a built-in word list, held against its opposite's list where it has one."""
    lists = built_in()
    if name not in OPPOSITES:
        return build_attribute(session, name, lists[name], report, pooling, reduction)
    one, other = (build_attribute(session, each, lists[each], report, pooling) for each in (name, OPPOSITES[name]))
    attribute = opposite(session, one, other)[0]
    return _redirected(session, attribute, reduction, lambda: word_items(session, one.words, other.words), report)


def attribute_from_texts(
    session: Session,
    name: str,
    texts: Sequence[str],
    report: Report = silent,
    pooling: str = "mean",
    reduction: str | None = "mean",
) -> Attribute:
    """The same from texts, against neutral texts that come with braces."""
    neutral = neutral_texts()
    attribute = _build(session, name, pool_texts, texts, neutral, report, pooling)
    sides = [[Passage(text) for text in side] for side in (texts, neutral)]
    return _redirected(session, attribute, reduction, lambda: text_items(session, *sides), report)


def _redirected(
    session: Session, attribute: Attribute, reduction: str | None, items: Callable[[], list[Item]], report: Report
) -> Attribute:
    """Return the attribute with the direction given by `reduction`."""
    reduction = reduction or default_reduction(session)
    if reduction == "mean":
        return attribute
    if reduction != GRADIENT:
        hint = f"Words and texts that are no pairs have mean or {GRADIENT}."
        raise ConfigError(f"`{reduction}` needs pairs", where="--reduction", hint=hint)
    return with_gradient_direction(session, attribute, items(), report)


def with_gradient_direction(session: Session, attribute: Attribute, items: Sequence[Item], report: Report) -> Attribute:
    """The same attribute, pushed without training along the gradient of the odds of `items` (`directions`).

    Raises:
        ModelError: the model computes where gradients do not reach.
    """
    direction = cheapest_directions(session, items, report)
    scale = steering_scale(attribute.residual, direction, attribute.effective_layers)
    return replace(
        attribute, direction=direction, scale=scale, provenance={**attribute.provenance, "reduction": GRADIENT}
    )


def _build(
    session: Session,
    name: str,
    pool: Callable[..., Tensor],
    given: Sequence[str],
    neutral: Sequence[str],
    report: Report,
    pooling: str,
) -> Attribute:
    base, ffns = session.base, session.ffns
    with ExitStack() as stack:
        if session.adapter is not None:
            stack.enter_context(session.adapter.disabled())
        hidden = pool(base.model, base.tokenizer, ffns, given, report, pooling)
        reference = pool(base.model, base.tokenizer, ffns, neutral, pooling=pooling)
    residual = output_norms(session)
    texts, layers = pool is pool_texts, [ffn.layer for ffn in ffns]
    attribute = Attribute(
        name,
        [] if texts else list(given),
        hidden,
        reference,
        residual,
        steering_scale(residual, hidden - reference, default_layers(layers)),
        layers,
        base.fingerprint,
        base.name,
        pooling,
        len(given) if texts else 0,
    )
    check_numbers(attribute, name, OVERFLOW_HINT)
    return attribute


def check_numbers(attribute: Attribute, where: str, hint: str) -> None:
    """Refuse numbers that no base computes.

    Raises:
        ModelError: a tensor is not finite, pooled states are zero, or norms are not positive.
    """
    for part in (*_PARTS, *([] if attribute.direction is None else [_DIRECTION])):
        tensor = getattr(attribute, part)
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{attribute.name}.{part} holds numbers that are not finite", where=where, hint=hint)
        if part in ("hidden", "reference") and not bool(tensor.any()):
            raise ModelError(f"{attribute.name}.{part} holds nothing but zeros", where=where, hint=hint)
    if not bool((attribute.residual > 0).all()):
        raise ModelError(f"{attribute.name}.residual holds norms that are not positive", where=where, hint=hint)


def with_steered_layers(attribute: Attribute, layers: Sequence[int] | None) -> Attribute:
    """Return the attribute with a steering vector in other layers; None: unchanged.

    Raises:
        ConfigError: none of the layers has a feed-forward layer.
    """
    if layers is None:
        return attribute
    chosen = [layer for layer in attribute.layers if layer in layers]
    if not chosen:
        hint = f"Layers {attribute.layers} have one."
        raise ConfigError("none of these layers has a feed-forward layer", where="--layers", hint=hint)
    scale = steering_scale(attribute.residual, attribute.steering_direction, chosen)
    return replace(attribute, steered_layers=chosen, scale=scale)


def without_direction(attribute: Attribute) -> Attribute:
    """Return the attribute with p as the direction of its steering vector."""
    if attribute.direction is None:
        return attribute
    scale = steering_scale(attribute.residual, attribute.state, attribute.effective_layers)
    return replace(attribute, direction=None, scale=scale)


def opposite(session: Session, one: Attribute, other: Attribute) -> tuple[Attribute, Attribute]:
    """Two attributes as the ends of one axis: p = (pooled(one) - pooled(other)) / 2, and minus that.

    The reference of both is their middle.
    """
    middle = (one.hidden + other.hidden) / 2
    scale = steering_scale(one.residual, one.hidden - middle, one.effective_layers)
    ends = [replace(each, reference=middle, scale=scale, direction=None) for each in (one, other)]
    return ends[0], ends[1]


def load_attributes(path: Path, session: Session) -> dict[str, Attribute]:
    """Read an attribute file and hold it to the base it is used on.

    Raises:
        ModelError: damaged, or built for another base.
    """
    header = read_header(path)
    different = differences(header.fingerprint, session.base.fingerprint, "attribute")
    if different:
        names = {str(each["base"]) for each in header.details.values() if each.get("base")}
        of = f"It belongs to {', '.join(sorted(names))}. " if names else ""
        hint = f"{of}Build it again for this base: braces attr-build."
        raise ModelError(
            f"this attribute was built for another base ({'; '.join(different)})", where=str(path), hint=hint
        )
    if header.layers != [ffn.layer for ffn in session.ffns]:
        raise ModelError("`layers` are not those of the base", where=str(path), hint=HEADER.hint)
    attributes = {}
    for name, words in header.attributes.items():
        details: dict[str, Any] = {k: v for k, v in header.details.get(name, {}).items() if k in _RECORDED}
        if not set(details.get("steered_layers") or []) <= set(header.layers):
            raise ModelError("`steered_layers` are not among `layers`", where=str(path), hint=HEADER.hint)
        parts: dict[str, Any] = _read_parts(path, name, len(header.layers), header.fingerprint["hidden_size"])
        attribute = Attribute(name, words, **parts, layers=header.layers, fingerprint=header.fingerprint, **details)
        check_numbers(attribute, str(path), "The file is damaged; build it again: attr-build.")
        attributes[name] = attribute
    return attributes


def _read_parts(path: Path, name: str, layers: int, hidden_size: int) -> dict[str, Any]:
    """The tensors of one attribute, by the name of the field.

    Raises:
        ModelError: missing, damaged, or of another shape or type.
    """
    from safetensors import SafetensorError, safe_open

    parts: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            own = f"{name}.{_DIRECTION}" in file.keys()  # noqa: SIM118 (no mapping)
            for part in (*_PARTS, *([_DIRECTION] if own else [])):
                parts[part] = file.get_tensor(f"{name}.{part}")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"not an attribute file: {first_line(error)}", where=str(path), hint=HEADER.hint) from error
    for part, tensor in parts.items():
        shape = (layers, hidden_size) if part in ("hidden", "reference", _DIRECTION) else (layers,)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            what = f"{name}.{part} is {tuple(tensor.shape)} {tensor.dtype}, wanted {shape} torch.float32"
            raise ModelError(what, where=str(path), hint=HEADER.hint)
    return parts
