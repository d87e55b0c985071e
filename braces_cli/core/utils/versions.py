"""Versions of what a result depends on, read without importing any of it."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

from braces_cli import __version__


@cache
def versions() -> dict[str, str]:
    """`{braces, python, torch, transformers, ...}`; what is not installed is left out."""
    installed = {"braces": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets", "lm-eval", "safetensors"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
