"""Summary of an adapter: gates, relevance scales and projections of each layer, without the weights of the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braces_cli.core.adapter.files import StoredAdapter
from braces_cli.core.adapter.layer import projection_error
from braces_cli.core.adapter.model import Session, base_name, resolve_adapter
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN, MixtureFFN, find_ffns, parameter_total
from braces_cli.core.models.identity import differences, fingerprint
from braces_cli.core.models.load import checkpoint_folder, load_shape


def summarise(
    model: str | None, adapter: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return `{model, adapter, parameters, base_parameters, layers: [{layer, value_vectors, hidden_size, gate,
    relevance_scale, projection_error}]}`.

    `gate` is g = sigmoid(gate), `relevance_scale` is c. In layers without an adapter these two and `projection_error`
    have the value None.

    Raises:
        ModelError: the model or the adapter cannot be read, or they do not fit.
    """
    stored = resolve_adapter(adapter)
    name = base_name(model, stored)
    if stored is not None and model is None:
        revision = revision or stored.config.revision
    shape = load_shape(name, revision=revision, trust_remote_code=trust_remote_code)
    ffns = find_ffns(shape)
    if stored is not None:
        found = differences(stored.config.fingerprint, fingerprint(shape, ffns, checkpoint_folder(name, revision)))
        if found:
            what = f"this adapter was trained on another base ({'; '.join(found)})"
            raise ModelError(what, where=adapter, hint=f"It needs {stored.config.base_model_name_or_path}.")
    return _summary(name, parameter_total(shape), ffns, stored)


def summarise_open(session: Session) -> dict[str, Any]:
    """Return `summarise` for an open model and its adapter."""
    total, adapter = parameter_total(session.base.model), session.adapter
    if adapter is not None:
        total -= adapter.parameter_count() + sum(p.numel() for p in (adapter.mlp.parameters() if adapter.mlp else ()))
    return _summary(session.base.name, total, session.ffns, session.stored)


def _summary(
    name: str, base_parameters: int, ffns: Sequence[FFN | MixtureFFN], stored: StoredAdapter | None
) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    scales: dict[int, float] = {}
    if stored is not None:
        tensors = stored.tensors
        scales = dict(zip(stored.config.layers, stored.config.relevance_scale, strict=True))
    layers = []
    for ffn in ffns:
        gate = tensors.get(f"layers.{ffn.layer}.gate")
        projection = tensors.get(f"layers.{ffn.layer}.projection")
        layers.append(
            {
                "layer": ffn.layer,
                "value_vectors": ffn.value_vectors,
                "hidden_size": ffn.hidden_size,
                "gate": None if gate is None else float(gate.sigmoid()),
                "relevance_scale": scales.get(ffn.layer),
                "projection_error": None if projection is None else projection_error(projection),
            }
        )
    return {
        "model": name,
        "adapter": None if stored is None else stored.name,
        "parameters": sum(tensor.numel() for tensor in tensors.values()) if stored else None,
        "base_parameters": base_parameters,
        "layers": layers,
    }
