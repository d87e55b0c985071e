"""What is trained: our own adapter, or one of peft's as a baseline, behind the same few calls."""

from __future__ import annotations

from typing import Any

from torch import nn

from braces_cli.core.method.adapter import Adapter, attach
from braces_cli.core.models.layer_ranges import chosen_layers
from braces_cli.data.examples import Examples
from braces_cli.data.streaming_examples import Stream
from braces_cli.training.peft_baselines import PeftAdapter
from braces_cli.training.settings import TrainSettings
from braces_cli.training.token_path import token_path_shares


def fresh_adapter(model: nn.Module, settings: TrainSettings, examples: Examples | Stream) -> Adapter | PeftAdapter:
    """A fresh adapter on an open base, where training starts.

    Raises:
        ConfigError: rank, layers or targets that do not fit the base, or peft is missing.
    """
    if settings.method != "braces":
        return PeftAdapter(model, settings)
    layers = chosen_layers(model, settings.layers)
    return attach(model, settings.rank, layers, settings.seed, settings.relevance)


def first_batch(examples: Examples | Stream, settings: TrainSettings) -> Any:
    """The rows that the token path is measured on: as many as a batch has, in the order of the file."""
    return examples.items[: settings.batch_size]


def shares(adapter: Adapter | PeftAdapter, settings: TrainSettings, examples: Examples | Stream) -> list[float] | None:
    """Norm of the token path over that of the FFN's output in each layer, three digits; None of a baseline."""
    if not isinstance(adapter, Adapter):
        return None
    return [float(f"{share:.3g}") for share in token_path_shares(adapter, first_batch(examples, settings))]


def parameter_groups(adapter: Adapter | PeftAdapter, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameters with their learning rates, as an optimizer takes them, each named as the option of its rate."""
    if isinstance(adapter, PeftAdapter):
        return [{"params": [p for _, p in adapter.named_parameters()], "lr": settings.lr, "name": "lr"}]
    groups: list[dict[str, Any]] = [
        {"params": [m for _, brace in adapter.sites for _, m in brace.matrices()], "lr": settings.lr, "name": "lr"},
        {"params": [brace.gate for _, brace in adapter.sites], "lr": settings.gate_lr, "name": "gate_lr"},
    ]
    if adapter.mlp is not None:
        groups.append({"params": list(adapter.mlp.parameters()), "lr": settings.lr})
    return groups
