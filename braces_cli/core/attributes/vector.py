"""An attribute of one base: its hidden state and its steering vector at every layer, and the file that holds them.

    p = pooled(attribute) - pooled(reference)           (layers, d), at the FFN's input, see `core.attributes.build`
    steering vector at s = 1: scale * direction         direction: p, or the gradient of the attribute's log odds
    scale = share / layers * residual / |direction|     all layers together: 10 % of the residual stream's median norm

p depends on the words of the attribute and of the reference only, not on other attributes. It is also pooled at the
FFN's output, for adapters with relevance to the output.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.files import FORMAT_VERSION, HEADER, Details, read_header
from braces_cli.core.errors import ConfigError, ModelError, first_line
from braces_cli.core.files import write_tensors
from braces_cli.core.models.identity import SAMPLES, Sizes, check_same_base

# Vectors along one direction add up in the residual stream, so the sum over layers is fixed, not the share of a layer.
STEERING_SHARE = 0.1
_SAMPLES = "base_samples"
_PARTS = ("hidden", "reference", "residual")


@dataclass(frozen=True)
class Attribute:
    """One attribute of one base; all tensors in float32 on the CPU.

    Attributes:
        name: of the attribute.
        words: that it was built from; empty if it was built from texts.
        hidden: pooled FFN inputs and FFN outputs of the words or texts, (2, layers, d).
        reference: the same of the reference, (2, layers, d).
        residual: norm of an addition to the FFN output that moves the residual stream by its median norm, (layers,).
        layers: decoder layer of each row.
        sizes: of the base.
        samples: of the base, (layers, 64); see `core.models.identity`.
        base: name of the base; recorded only.
        pooling: over the tokens of each word or text, one of `POOLINGS`.
        examples: number of texts that it was built from; 0 if it was built from words.
        steered_layers: decoder layers of the steering vector; None: the default layers.
        provenance: sources and reduction; recorded only.
        direction: direction of the steering vector if it is not p, (layers, d).
    """

    name: str
    words: list[str]
    hidden: Tensor
    reference: Tensor
    residual: Tensor
    layers: list[int]
    sizes: Sizes
    samples: Tensor
    base: str | None = None
    pooling: str = "mean"
    examples: int = 0
    steered_layers: list[int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    direction: Tensor | None = None

    @property
    def state(self) -> Tensor:
        """p, (layers, d)."""
        return self.state_at("input")

    def state_at(self, relevance_to: str) -> Tensor:
        """p at the FFN's input or output, (layers, d)."""
        return (self.hidden - self.reference)[0 if relevance_to == "input" else 1]

    @property
    def steering_direction(self) -> Tensor:
        """Direction of the steering vector, (layers, d)."""
        return self.state if self.direction is None else self.direction

    @property
    def effective_layers(self) -> list[int]:
        """Decoder layers of the steering vector."""
        return default_layers(self.layers) if self.steered_layers is None else self.steered_layers

    @cached_property
    def scale(self) -> Tensor:
        """Factor of the direction at s = 1, (layers,); 0 where the direction is 0."""
        size = self.steering_direction.norm(dim=-1)
        share = STEERING_SHARE / max(len(self.effective_layers), 1)
        return torch.where(size > 0, share * self.residual / size, torch.zeros_like(size))


def default_layers(layers: Sequence[int]) -> list[int]:
    """Return the first half: a vector added in later layers costs more perplexity for less of the attribute."""
    return list(layers[: (len(layers) + 1) // 2])


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
    return replace(attribute, steered_layers=chosen)


def opposite(one: Attribute, other: Attribute) -> tuple[Attribute, Attribute]:
    """Return two attributes as the ends of one axis: p = (pooled(one) - pooled(other)) / 2, and minus that."""
    middle = (one.hidden + other.hidden) / 2
    return replace(one, reference=middle, direction=None), replace(other, reference=middle, direction=None)


def save_attributes(path: Path, attributes: Sequence[Attribute]) -> None:
    """Write attributes of one base into a file: tensors `{name}.hidden` and so on, the rest in the header."""
    tensors = {f"{each.name}.{part}": getattr(each, part) for each in attributes for part in _PARTS}
    tensors[_SAMPLES] = attributes[0].samples
    tensors |= {f"{each.name}.direction": each.direction for each in attributes if each.direction is not None}
    details = {each.name: {name: getattr(each, name) for name in Details.__annotations__} for each in attributes}
    header = {
        "format_version": FORMAT_VERSION,
        "attributes": json.dumps({each.name: each.words for each in attributes}, ensure_ascii=False),
        "layers": json.dumps(attributes[0].layers),
        "sizes": json.dumps(attributes[0].sizes),
        "details": json.dumps(details),
    }
    write_tensors(path, tensors, header)


def load_attributes(path: Path, session: Session) -> dict[str, Attribute]:
    """Read the attributes of a file by name.

    Raises:
        ModelError: a file that is damaged, or was built for another base.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"not an attribute file: {first_line(error)}", where=str(path), hint=HEADER.hint) from error

    def tensor(name: str, *shape: int) -> Tensor:
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or found.dtype != torch.float32:
            is_ = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise ModelError(f"{name} is {is_}, expected {shape} torch.float32", where=str(path), hint=HEADER.hint)
        return found

    rows, d = len(header.layers), header.sizes["hidden_size"]
    samples = tensor(_SAMPLES, rows, SAMPLES)
    names = sorted({str(each["base"]) for each in header.details.values() if each.get("base")})
    hint = f"It needs {', '.join(names) or 'its base'}; or build it again: braces attr-build."
    by_layer = dict(zip(header.layers, samples, strict=True))
    check_same_base("this attribute was built for", header.sizes, by_layer, session.base, str(path), hint)
    if header.layers != [ffn.layer for ffn in session.ffns]:
        raise ModelError("`layers` are not those of the base", where=str(path), hint=HEADER.hint)
    attributes = {}
    for name, words in header.attributes.items():
        details: dict[str, Any] = {**header.details.get(name, {})}
        if not set(details.get("steered_layers") or []) <= set(header.layers):
            raise ModelError("`steered_layers` are not among `layers`", where=str(path), hint=HEADER.hint)
        parts: dict[str, Any] = {p: tensor(f"{name}.{p}", 2, rows, d) for p in ("hidden", "reference")}
        parts["residual"] = tensor(f"{name}.residual", rows)
        if f"{name}.direction" in tensors:
            parts["direction"] = tensor(f"{name}.direction", rows, d)
        base: dict[str, Any] = {"layers": header.layers, "sizes": header.sizes, "samples": samples}
        attribute = Attribute(name, words, **parts, **base, **details)
        check_numbers(attribute, str(path), "The file is damaged; build it again: attr-build.")
        attributes[name] = attribute
    return attributes


def check_numbers(attribute: Attribute, where: str, hint: str) -> None:
    """Refuse tensors that no base computes.

    Raises:
        ModelError: a tensor that is not finite, pooled states that are zero, or norms that are not positive.
    """
    for part in (*_PARTS, "direction"):
        tensor: Tensor | None = getattr(attribute, part)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ModelError(f"{attribute.name}.{part} has numbers that are not finite", where=where, hint=hint)
        if part in ("hidden", "reference") and not bool(getattr(attribute, part).any()):
            raise ModelError(f"{attribute.name}.{part} is zero", where=where, hint=hint)
    if not bool((attribute.residual > 0).all()):
        raise ModelError(f"{attribute.name}.residual has norms that are not positive", where=where, hint=hint)
