"""What launchers of several processes may ask for, looked at before anything is loaded.

How large what the adapter adds is beside the FFN's output.

What is trained: our own adapter, or one of peft's as a baseline, behind the same few calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.files import StoredAdapter, find_adapter, read_config
from braces_cli.core.adapter.layer import RelevanceModule
from braces_cli.core.adapter.model import Adapter, Session, attach, attach_stored, hook_ffn
from braces_cli.core.adapter.scale import measure_scales, run_texts
from braces_cli.core.attributes.words import neutral_texts
from braces_cli.core.distributed import gathered
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import chosen_layers
from braces_cli.core.models.tokenize import Encoded, encode
from braces_cli.data.dataset import Examples, Stream
from braces_cli.training.baselines import PeftAdapter
from braces_cli.training.settings import TrainSettings

_DDP = "Use recipes/launch/ddp.yaml, or torchrun."
_FSDP2 = "Start from recipes/launch/fsdp2.yaml."
# What `accelerate launch` can turn on and an adapter cannot be trained under.
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def check_launch(device: str) -> None:
    """Refuse what cannot work.

    Args:
        device: as `--device` names it.

    Raises:
        ConfigError: FSDP on a CPU, or set up in a way that cannot work; DeepSpeed; tensor, context or pipeline
            parallelism.
    """
    for name, what in _OTHERS.items():
        if _is_set(name):
            raise ConfigError("an adapter is trained under DDP or FSDP2 only", where=what, hint=_DDP)
    if _is_set("ACCELERATE_USE_FSDP"):
        _check_fsdp(device)


def _check_fsdp(device: str) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        what = "only version 2 keeps an adapter's parameters apart from those of the base"
        raise ConfigError(what, where="fsdp_version", hint=_FSDP2)
    if _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        what = "every process runs the base before it is spread, so each must have read it"
        raise ConfigError(what, where="fsdp_cpu_ram_efficient_loading: true", hint=_FSDP2)
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        what = "it gives parameters other names than they are saved by"
        hint = "Set it to false, and give --gradient-checkpointing."
        raise ConfigError(what, where="fsdp_activation_checkpointing: true", hint=hint)
    from braces_cli.core.models.load import pick_device

    if pick_device(device).type == "cpu":
        raise ConfigError("accelerate has no FSDP on a CPU: the base would not be spread", where="FSDP", hint=_DDP)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def side_path_shares(adapter: Adapter, examples: Sequence[Encoded]) -> list[float]:
    """For each layer |B A h| / |FFN(h)|, the median over the tokens of `examples`, without any attribute."""
    adapter.condition(None)
    recorders = [_TermRecorder(adapter_layer) for _, adapter_layer in adapter.adapted_ffns]
    with adapter.disabled(), ExitStack() as stack:
        for (ffn, _), recorder in zip(adapter.adapted_ffns, recorders, strict=True):
            for handle in (handle for part in ffn.parts for handle in hook_ffn(part, recorder)):
                stack.callback(handle.remove)
        run_texts(adapter.model, [example.ids for example in examples])
    return [float(torch.cat(found.ratios).median()) if found.ratios else 0.0 for found in recorders]


class _TermRecorder:
    """Does what a relevance module does, and keeps |term| / |output| of every row where the output is not zero."""

    enabled = True

    def __init__(self, adapter_layer: RelevanceModule) -> None:
        self._adapter_layer = adapter_layer
        self.ratios: list[Tensor] = []

    def __call__(self, output: Tensor, *rest: Any) -> Tensor:
        return self._add(self._adapter_layer, output, *rest)

    def routed(self, output: Tensor, *rest: Any) -> Tensor:
        return self._add(self._adapter_layer.routed, output, *rest)

    def by_expert(self, output: Tensor, *rest: Any) -> Tensor:
        return self._add(self._adapter_layer.by_expert, output, *rest)

    def _add(self, add: Callable[..., Tensor], output: Tensor, *rest: Any) -> Tensor:
        # Added to zero: the difference of two bfloat16 sums would be rounding.
        term = add(torch.zeros_like(output), *rest).detach().float().flatten(0, -2).norm(dim=-1)
        size = output.detach().float().flatten(0, -2).norm(dim=-1)
        self.ratios.append((term / size)[size > 0].cpu())
        return add(output, *rest)


def starting_point(settings: TrainSettings) -> StoredAdapter | None:
    """The adapter that `--adapter` names; None where there is none.

    Raises:
        ConfigError: another rank, layers or relevance scale is requested, or the adapter was trained with attributes
            and this run is without.
        ModelError: no such adapter.
    """
    if settings.adapter is None:
        return None
    start = find_adapter(settings.adapter)
    config = start.config
    for name, stored in (("rank", config.r), ("layers", ",".join(map(str, config.layers)))):
        if name in settings.given and getattr(settings, name) != stored:
            hint = f"Leave out --{name}, or train a new adapter without --adapter."
            raise ConfigError(f"the adapter has {name} {stored}", where=f"--{name}", hint=hint)
    if settings.scale is not None and set(config.relevance_scale) != {settings.scale}:
        hint = "Leave out --relevance-scale, or train a new adapter without --adapter."
        raise ConfigError("the adapter has another relevance scale", where="--relevance-scale", hint=hint)
    if config.attributes and settings.attribute_field is None:
        hint = "Name the column of each row's attribute with --attribute-field."
        raise ConfigError("the adapter was trained with attributes", where="--adapter", hint=hint)
    return start


def adapter_to_train(
    session: Session,
    settings: TrainSettings,
    examples: Examples | Stream,
    start: StoredAdapter | None = None,
    checkpoint: Path | None = None,
) -> Adapter | PeftAdapter:
    """An adapter on an open base, where training starts: a fresh one, or `start`.

    Args:
        checkpoint: of the run that is resumed, which holds the relevance scales.

    Raises:
        ConfigError: rank, layers or targets that do not fit the base, or peft is missing.
        ModelError: `start` is damaged or belongs to another base.
    """
    model = session.base.model
    if start is not None:
        adapter = attach_stored(session.base, start)
        modules = [adapter_layer for _, adapter_layer in adapter.adapted_ffns] + (
            [adapter.mlp] if adapter.mlp is not None else []
        )
        for module in modules:
            module.requires_grad_(True)
        return adapter
    if settings.method != "braces":
        return PeftAdapter(model, settings)
    layers = adapted_layers(model, settings)
    scales = _scales(session, settings, layers) if checkpoint is None else read_config(checkpoint).relevance_scale
    return attach(model, settings.rank, layers, settings.seed, scales, session.ffns)


def _scales(session: Session, settings: TrainSettings, layers: Sequence[int] | None) -> list[float]:
    """c of each adapted layer, measured on the base unless the settings give it."""
    ffns = [ffn for ffn in session.ffns if layers is None or ffn.layer in layers]
    if settings.scale is not None:
        return [settings.scale] * len(ffns)
    texts = [encode(session.base.tokenizer, text).ids for text in neutral_texts()]
    # In half precision the numbers can differ between devices, but all processes must train the same adapter.
    return gathered(measure_scales(session.base.model, ffns, texts))[0]


def adapted_layers(model: Any, settings: TrainSettings) -> list[int] | None:
    """The decoder layers of `--layers`, or of the adapter that is continued; None: all.

    Raises:
        ConfigError: `--layers` are not those of the model.
        ModelError: the adapter's are not.
    """
    try:
        return chosen_layers(model, settings.layers)
    except ConfigError as error:
        adapter = settings.adapter
        if adapter is None:
            raise
        what = f"its layers are not those of the base: {error.message}"
        raise ModelError(what, where=adapter, hint="Was it trained on this base?") from error


def first_batch(examples: Examples | Stream, settings: TrainSettings) -> Any:
    """The rows that the side path is measured on: as many as a batch has, in the order of the file."""
    return examples.items[: settings.batch_size]


def shares(adapter: Adapter | PeftAdapter, settings: TrainSettings, examples: Examples | Stream) -> list[float] | None:
    """Norm of the side path over that of the FFN's output in each layer, three digits; None of a baseline."""
    if not isinstance(adapter, Adapter):
        return None
    return [float(f"{share:.3g}") for share in side_path_shares(adapter, first_batch(examples, settings))]


def parameter_groups(adapter: Adapter | PeftAdapter, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameters with their learning rates, as an optimizer takes them, each named as the option of its rate."""
    if isinstance(adapter, PeftAdapter):
        return [{"params": [p for _, p in adapter.named_parameters()], "lr": settings.lr, "name": "lr"}]
    groups: list[dict[str, Any]] = [
        {
            "params": [adapter_layer.weight for _, adapter_layer in adapter.adapted_ffns],
            "lr": settings.lr,
            "name": "lr",
        },
        {
            "params": [adapter_layer.gate for _, adapter_layer in adapter.adapted_ffns],
            "lr": settings.gate_lr,
            "name": "gate_lr",
        },
    ]
    if adapter.mlp is not None:
        groups.append({"params": list(adapter.mlp.parameters()), "lr": settings.lr})
    return groups
