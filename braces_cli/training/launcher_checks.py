"""What launchers of several processes may ask for, looked at before anything is loaded."""

from __future__ import annotations

import os

from braces_cli.core.utils.errors import ConfigError

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
    from braces_cli.core.models.loading import pick_device

    if pick_device(device).type == "cpu":
        raise ConfigError("accelerate has no FSDP on a CPU: the base would not be spread", where="FSDP", hint=_DDP)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"
