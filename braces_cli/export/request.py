"""What is to be exported, and how base, adapter and attributes are opened for it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.adapter.files import StoredAdapter
from braces_cli.core.adapter.model import Session, attached, base_name, open_session
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import ConfigError
from braces_cli.core.files import user_path
from braces_cli.core.models.options import chosen_layers
from braces_cli.core.models.tokenize import encode
from braces_cli.core.options import LoadOptions
from braces_cli.export.checkpoint import companions
from braces_cli.export.form import refuse


@dataclass(frozen=True)
class Request:
    """What is to be exported.

    Attributes:
        model: the base, None for the adapter's own.
        adapter: its files, read and checked; None where the base or an attribute alone is exported.
        options: how to load the base; its dtype is the one that is written.
        attributes: strength s of each attribute that is exported as a constant.
        attributes_dir: where they are looked up first.
        layers: decoder layers that are steered, as `--layers` says; None is all.
        pad_to_multiple_of: what the width of the FFN is rounded up to a multiple of.
    """

    model: str | None
    adapter: StoredAdapter | None
    options: LoadOptions
    attributes: dict[str, float] = field(default_factory=dict)
    attributes_dir: Path | None = None
    layers: str | None = None
    pad_to_multiple_of: int = 64

    @property
    def stored(self) -> StoredAdapter:
        """The adapter of an export that needs one.

        Raises:
            ConfigError: none was given.
        """
        if self.adapter is None:
            raise ConfigError("missing option", where="--adapter", hint="Name the adapter that is to be exported.")
        return self.adapter


def inputs(request: Request) -> list[Path]:
    """Folders that are read, and must be neither written into nor replaced."""
    name = user_path(base_name(request.model, request.adapter))
    found = [name] if name.is_dir() else []
    found += [] if request.adapter is None else [request.adapter.folder]
    return found + ([] if request.attributes_dir is None else [request.attributes_dir])


def sources(request: Request) -> dict[str, Any]:
    """The inputs as commands print and record them."""
    return {
        "model": base_name(request.model, request.adapter),
        "adapter": None if request.adapter is None else request.adapter.name,
        "attributes": request.attributes,
        "layers": request.layers,
    }


def open_bare(request: Request) -> Session:
    """The base without its adapter, after the adapter was found to fit it.

    Raises:
        ConfigError: it is asked for quantised, or not all in memory.
        ModelError: it cannot be loaded, does not fit, or has no checkpoint folder; or a file of that is a link to
            somewhere else.
    """
    if request.options.quantize is not None:
        raise ConfigError("an export is written from whole weights", where="--quantize", hint="Leave --quantize out.")
    session = open_session(request.model, request.adapter, request.options)
    session.remove_adapter()
    if any(parameter.is_meta for parameter in session.base.model.parameters()):
        hint = "Leave --device-map out; an export holds the base in memory once, a GPU is not needed."
        raise ConfigError("parts of the base are not in memory", where="--device-map", hint=hint)
    if session.base.checkpoint is None:
        raise refuse(session.base.model, "it has no checkpoint folder, from which to take its tokenizer")
    companions(session.base.checkpoint)
    return session


def probe_tokens(session: Session) -> torch.Tensor:
    """A few tokens to watch the FFNs with, (1, tokens)."""
    ids = encode(session.base.tokenizer, "The town has a library, a school and two small shops.").ids
    return torch.tensor([ids], device=session.base.model.get_input_embeddings().weight.device)


def steering(session: Session, request: Request) -> tuple[list[Any], Collection[int] | None]:
    """(attributes with their strengths, decoder layers that are steered) on a bare base.

    Raises:
        ConfigError: an unknown attribute, or a layer that the adapter does not have.
    """
    layers = chosen_layers(session.base.model, request.layers)
    if not request.attributes:
        return [], layers
    requested = request.attributes.items()
    # An adapter's folder is searched, and its attributes may have been trained.
    with nullcontext() if request.adapter is None else attached(session, request.adapter):
        terms = [(find_attribute(session, name, request.attributes_dir), s) for name, s in requested]
    through = request.adapter is not None and any(attribute.direction is None for attribute, _ in terms)
    there = request.adapter.config.layers if request.adapter is not None else []
    missing = sorted(set(layers or ()) - set(there))
    if through and missing:
        hint = f"It has layers {', '.join(map(str, there))}."
        raise ConfigError(f"the adapter has no layer {missing[0]} to steer", where="--layers", hint=hint)
    return terms, layers
