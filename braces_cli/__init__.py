"""braces: fine-tune, evaluate, steer and inspect causal language models with LLMBraces adapters (arXiv 2503.16334).

From Python:

    import braces_cli as braces

    model = braces.load("out")
    model.steer("positive", 2).generate("The film is")

`load`, `train` and `Model` are in `braces_cli.api`, which is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braces_cli.api import Model, load, train

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in ("Model", "load", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # They import torch, which no command's --help may wait for.
    from braces_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
