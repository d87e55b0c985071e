"""What launchers of several processes may ask for, looked at before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from braces_cli.core.errors import ConfigError


def check_launch(resume: bool, attributes: bool) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: DeepSpeed ZeRO-3, a run to be resumed under DeepSpeed, or attributes under FSDP.
    """
    if _asked_for("ACCELERATE_USE_FSDP") and attributes:
        raise ConfigError(
            "attributes cannot be trained under FSDP: they are read between the layers, where those lie in pieces",
            where="--attribute-field",
            hint="Use recipes/accelerate/ddp.yaml.",
        )
    if not _asked_for("ACCELERATE_USE_DEEPSPEED"):
        return
    if resume:
        hint = "Resume it with DDP or FSDP2 (recipes/accelerate); checkpoints that those wrote will do."
        raise ConfigError("DeepSpeed keeps the optimizer's state in files of its own", where="--resume", hint=hint)
    if zero_stage() == 3:
        raise ConfigError(
            "ZeRO-3 cannot train a braces adapter: it keeps each FFN's value matrix in pieces whenever that layer is "
            "not running itself, and the adapter reads the matrix whole",
            where="DeepSpeed",
            hint="Use FSDP2 (recipes/accelerate/fsdp2.yaml), or ZeRO-1 or 2.",
        )


def _asked_for(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def zero_stage() -> int:
    """Of DeepSpeed, as `accelerate launch` passes it on: in a file of its own or in the environment."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path and path != "none":
        settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return int(settings.get("zero_optimization", {}).get("stage", 0))
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
