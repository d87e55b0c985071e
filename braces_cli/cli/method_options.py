"""Options of `train` that say what is trained: the method, where it starts, and what only baselines have. Light."""

from __future__ import annotations

from typing import Annotated

import typer

from braces_cli.core.method.relevance_forms import FORMS
from braces_cli.core.utils.errors import ConfigError
from braces_cli.training.settings import (
    BASELINE_LR,
    BASELINE_ONLY,
    BASELINES,
    BRACES_ONLY,
    DEFAULT_CONTRAST,
    DEFAULT_GATE_LR,
    DEFAULT_GATE_LR_ATTRIBUTES,
    DEFAULT_MARGIN,
    DEFAULT_TURN,
    INITS,
    METHODS,
    SCALES,
)

Method = Annotated[
    str, typer.Option("--method", help=f"What to train: {', '.join(METHODS)}; all but the first through peft.")
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", help=f"Peak rate; default {DEFAULT_TURN:g} / sqrt(width), of a baseline {BASELINE_LR:g}."),
]
GateLearningRate = Annotated[
    float | None,
    typer.Option(
        "--gate-lr",
        help=f"Of the gates; default {DEFAULT_GATE_LR:g}, with attributes {DEFAULT_GATE_LR_ATTRIBUTES:g}.",
    ),
]
Init = Annotated[str, typer.Option("--init", help=f"Where projections start: {', '.join(INITS)}.")]
Scale = Annotated[
    str, typer.Option("--scale", help=f"{' or '.join(SCALES)}: a fixed factor per layer that fits the base's weights.")
]
Contrast = Annotated[
    float | None,
    typer.Option(
        "--contrast",
        help="Weight of telling each row's strength from its opposite, for twice the time; "
        f"default {DEFAULT_CONTRAST:g} with attributes.",
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        "--margin",
        help=f"By how much, in nats a row and unit of strength: how strongly it steers; default {DEFAULT_MARGIN:g}.",
    ),
]
Relevance = Annotated[str, typer.Option("--relevance", help=f"Form of relevance: {', '.join(FORMS)}.")]
LoraAlpha = Annotated[int | None, typer.Option("--lora-alpha", min=1, help="Of a baseline; default twice the rank.")]
LoraTargets = Annotated[
    list[str] | None,
    typer.Option("--lora-targets", help="Modules a baseline adapts, such as q_proj,v_proj (the default). Repeatable."),
]

# Without attributes another thing would be trained than was asked for, so they are refused wherever they stand.
_ATTRIBUTES = ("attribute_field", "opposites", "attributes")


def settle(ctx: typer.Context) -> None:
    """Fill in the learning rate of a baseline, and refuse options that it would not read.

    A recipe may hold settings of both kinds, so that one file serves every method: what stands in a file and is not
    read is no error, attributes excepted.

    Raises:
        ConfigError: no such method, or an option that contradicts it.
    """
    method = ctx.params["method"]
    if method not in METHODS:
        raise ConfigError(f"no method `{method}`", where="--method", hint=f"One of {', '.join(METHODS)}.")
    baseline = method in BASELINES
    for name in (*_ATTRIBUTES, *BRACES_ONLY) if baseline else BASELINE_ONLY:
        source = str(getattr(ctx.get_parameter_source(name), "name", ""))
        if source == "COMMANDLINE" or (name in _ATTRIBUTES and source == "DEFAULT_MAP"):
            option = "--" + name.replace("_", "-")
            hint = f"Leave it out, or use {'--method braces' if baseline else 'a baseline, such as --method lora'}."
            raise ConfigError(f"{method} has no use for {option}", where=option, hint=hint)
    if baseline and ctx.params["lr"] is None:
        ctx.params["lr"] = BASELINE_LR


def names(values: list[str] | None) -> tuple[str, ...]:
    """Names of a repeatable option that also takes several, separated by commas."""
    return tuple(name.strip() for value in values or () for name in value.split(",") if name.strip())
