"""Versions of what a result depends on, read without importing any of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata

from braces_cli import __version__

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "safetensors")
# What else a bug report should name.
MORE_LIBRARIES = ("huggingface-hub", "tokenizers", "peft", "gguf", "torchao", "bitsandbytes", "typer", "rich")


@cache
def versions() -> dict[str, str]:
    """`{braces, python, torch, transformers, ...}`; what is not installed is left out."""
    return {"braces": __version__, "python": platform.python_version(), **installed(_LIBRARIES)}


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Version of each package; what is not installed is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
