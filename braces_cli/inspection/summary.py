"""Summary of an adapter: gates, relevance scales and projections of each layer, without the weights of the base."""

from typing import Any

from braces_cli.core.adapter.files import StoredAdapter
from braces_cli.core.adapter.layer import projection_error
from braces_cli.core.models.ffn import parameter_total
from braces_cli.core.models.load import Base


def summarise(base: Base, stored: StoredAdapter | None, *, is_attached: bool = False) -> dict[str, Any]:
    """Return `{model, adapter, parameters, relevance_to, base_parameters, layers: [{layer, value_vectors, hidden_size,
    gate, relevance_scale, projection_error}]}`.

    `gate` is g = sigmoid(gate), with relevance to the output the mean of |D|; `relevance_scale` is c. In layers without
    an adapter these two and `projection_error` have the value None.

    Args:
        base: base model; its shape is enough.
        is_attached: the parameters of the adapter are parameters of the base's model.
    """
    tensors = {} if stored is None else stored.tensors
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("base_samples"))
    scales = {} if stored is None else dict(zip(stored.config.layers, stored.config.relevance_scale, strict=True))
    layers = []
    for ffn in base.ffns:
        mine = {name.rpartition(".")[2]: tensors[name] for name in tensors if name.startswith(f"layers.{ffn.layer}.")}
        errors = [projection_error(tensor) for name, tensor in mine.items() if name.endswith("projection")]
        gate = mine["gate"].sigmoid() if "gate" in mine else mine.get("diagonal")
        layers.append(
            {
                "layer": ffn.layer,
                "value_vectors": ffn.value_vectors,
                "hidden_size": ffn.hidden_size,
                "gate": None if gate is None else float(gate.abs().mean()),
                "relevance_scale": scales.get(ffn.layer),
                "projection_error": max(errors, default=None),
            }
        )
    return {
        "model": base.name,
        "adapter": None if stored is None else stored.name,
        "parameters": None if stored is None else parameters,
        "relevance_to": None if stored is None else stored.config.relevance_to,
        "base_parameters": parameter_total(base.model) - (parameters if is_attached else 0),
        "layers": layers,
    }
