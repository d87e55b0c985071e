"""`braces env`: versions, devices and caches for a bug report."""

import os
import platform
import sys
from typing import Any

from braces_cli.cli.options import command
from braces_cli.cli.output import print_json, print_pairs
from braces_cli.core.errors import first_line
from braces_cli.core.options import DisplaySettings

# Environment variables that change the behaviour; none of them is a secret.
_VARIABLES = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "BRACES_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "WORLD_SIZE",
)  # fmt: skip
_LIBRARIES = ("huggingface-hub", "tokenizers", "peft", "gguf", "torchao", "bitsandbytes", "typer", "rich")


@command
def env(settings: DisplaySettings) -> None:
    """Versions, devices, threads and caches: what a bug report needs. Shows no token and no password."""
    found = environment()
    if settings.json:
        print_json(found)
        return
    facts = {name: found[name] for name in ("braces", "python", "system", "threads")}
    libraries = {name: v for name, v in found["versions"].items() if name not in facts}
    devices = [f"{d['name']} ({d['memory'] / 1e9:.1f} GB)" for d in found["devices"]] or ["CPU only"]
    shown = {**facts, "devices": devices, **{f"finite on {kind}": value for kind, value in found["finite"].items()}}
    variables = [f"{name}={value}" for name, value in found["variables"].items()]
    print_pairs("environment", {**shown, **found["caches"], "variables": variables, **libraries})


def environment() -> dict[str, Any]:
    """Return `{braces, python, system, versions, devices, finite, threads, caches, variables}`, memory in bytes."""
    import torch
    from huggingface_hub import constants

    from braces_cli import __version__
    from braces_cli.core.files import cache_folder, versions

    cuda = torch.cuda
    properties = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    devices = [{"name": each.name, "memory": each.total_memory} for each in properties]
    kinds = ["cpu", *(f"cuda:{index}" for index in range(len(devices)))]
    if torch.backends.mps.is_available():
        devices.append({"name": "Apple GPU (mps)", "memory": torch.mps.recommended_max_memory()})
        kinds.append("mps")
    return {
        "braces": __version__,
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        "system": platform.platform(),
        "versions": versions(_LIBRARIES),
        "devices": devices,
        "finite": {kind: computes_finite(kind) for kind in kinds},
        "threads": torch.get_num_threads(),
        "caches": {
            "hub_cache": constants.HF_HUB_CACHE,
            "braces_cache": str(cache_folder() or "off"),
            "offline": constants.HF_HUB_OFFLINE,
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def computes_finite(device: str) -> bool | str:
    """Return whether a softmax and its gradient are finite on `device` in float32 and bfloat16, or the error."""
    import torch

    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.linspace(-1, 1, 64 * 64, dtype=dtype).view(64, 64).to(device).requires_grad_()
            ((x @ x.mT).softmax(dim=-1) @ x).square().sum().backward()
            if x.grad is None or not bool(x.grad.isfinite().all()) or not bool(x.grad.any()):
                return False
    except RuntimeError as error:
        return first_line(error)
    return True
