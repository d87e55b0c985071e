"""What launchers of several processes may ask for, looked at before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

from braces_cli.core.utils.documents import Count, Kind, read
from braces_cli.core.utils.errors import ConfigError

_DDP = "Use recipes/launch/ddp.yaml, or torchrun."
_FSDP2 = "Start from recipes/launch/fsdp2.yaml."
# What `accelerate launch` can turn on and an adapter cannot be trained under.
_OTHERS = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config"}


def check_launch(device: str) -> None:
    """Refuse what cannot work.

    Args:
        device: as `--device` names it.

    Raises:
        ConfigError: DeepSpeed ZeRO-3; FSDP on a CPU, or set up in
            a way that cannot work; tensor, context or pipeline parallelism.
    """
    for name, what in _OTHERS.items():
        if _is_set(name):
            raise ConfigError("an adapter is trained under DDP, FSDP2 or ZeRO-1 and 2 only", where=what, hint=_DDP)
    if _is_set("ACCELERATE_USE_FSDP"):
        _check_fsdp(device)
    if not uses_deepspeed():
        return
    if zero_stage() == 3:
        raise ConfigError(
            "ZeRO-3 cannot train a braces adapter: it keeps each FFN's value matrix in pieces whenever that layer is "
            "not running itself, and the adapter reads the matrix whole",
            where="DeepSpeed",
            hint="Use FSDP2 (recipes/launch/fsdp2.yaml), or ZeRO-1 or 2.",
        )


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
    from braces_cli.core.models.loading import pick_device

    if pick_device(device).type == "cpu":
        raise ConfigError("accelerate has no FSDP on a CPU: the base would not be spread", where="FSDP", hint=_DDP)


def uses_deepspeed() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


class ZeroSettings(TypedDict, total=False):
    """The part of DeepSpeed's settings that spreads a model."""

    stage: Count


class DeepSpeedSettings(TypedDict, total=False):
    """What is read of a file of DeepSpeed's settings."""

    zero_optimization: ZeroSettings


_DEEPSPEED = Kind(DeepSpeedSettings, ConfigError, "See DeepSpeed's page of its JSON.", "DeepSpeed file", foreign=True)


def zero_stage() -> int:
    """Of DeepSpeed, as `accelerate launch` passes it on: in a file of its own or in the environment."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path and path != "none":
        zero = read(_DEEPSPEED, Path(path)).get("zero_optimization", {})
        return zero.get("stage", 0)
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
