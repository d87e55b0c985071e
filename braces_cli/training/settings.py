"""What a training run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from braces_cli.core.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant")
PACKING = ("auto", "on", "off")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run.

    Attributes:
        rank: d_r.
        layers: indices of the layers to adapt; None is all.
        lr: peak learning rate of the projections.
        gate_lr: peak learning rate of the gates. They start nearly shut, and so do the gradients of the projections,
            so they need a rate of their own.
        epochs: passes over the data, unless `max_steps` is set.
        max_steps: optimizer steps.
        batch_size: examples a process and step.
        gradient_accumulation: batches an optimizer step.
        warmup_steps: optimizer steps until the peak rate.
        schedule: of the rate after the warm-up: linear or cosine to zero, or constant.
        max_length: tokens of an example that are kept.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        seed: of the projections' start and the order of examples.
        attribute_field: column of the rows' attributes; None: attributes are not trained.
        strength_field: column of their strengths.
        opposites: pairs of attributes that are the two ends of one axis.
        packing: several examples a row: auto (where a probe shows that it changes nothing), on or off.
        streaming: rows are read as they are needed; needs `max_steps`.
        chat_template: some rows are chats, written by the tokenizer's template.
    """

    rank: int = 16
    layers: list[int] | None = None
    lr: float = 3e-3
    gate_lr: float = 1e-1
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    warmup_steps: int = 20
    schedule: str = "linear"
    max_length: int = 1024
    gradient_checkpointing: bool = False
    seed: int = 0
    attribute_field: str | None = None
    strength_field: str = "strength"
    opposites: tuple[tuple[str, str], ...] = ()
    packing: str = "auto"
    streaming: bool = False
    chat_template: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "gate_lr", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be a positive number, not {getattr(self, name)}", where=_option(name))
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"no schedule `{self.schedule}`", where="--schedule", hint=f"One of {', '.join(SCHEDULES)}."
            )
        if self.packing not in PACKING:
            raise ConfigError(f"no packing `{self.packing}`", where="--packing", hint=f"One of {', '.join(PACKING)}.")
        if self.streaming and self.max_steps is None:
            raise ConfigError(
                "a stream has no known length", where="--streaming", hint="Say how long to train with --max-steps."
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
