"""What a training run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from braces_cli.core.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant")
REPORTERS = ("tensorboard", "wandb", "none")


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

    def __post_init__(self) -> None:
        for name in ("lr", "gate_lr", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be a positive number, not {getattr(self, name)}", where=_option(name))
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"no schedule `{self.schedule}`", where="--schedule", hint=f"One of {', '.join(SCHEDULES)}."
            )


@dataclass(frozen=True)
class Upkeep:
    """What happens beside the training, and changes nothing of its outcome. All counts are optimizer steps.

    Attributes:
        save_steps: between checkpoints; 0: none.
        save_total_limit: checkpoints that are kept; 0: all.
        eval_steps: between measurements of the evaluation rows; 0: at the end only.
        logging_steps: between rows of `metrics.jsonl`.
        report_to: tensorboard, wandb or none.
        resume: go on from the newest checkpoint.
        push_to_hub: repository that the adapter is uploaded to.
    """

    save_steps: int = 500
    save_total_limit: int = 2
    eval_steps: int = 0
    logging_steps: int = 10
    report_to: str = "none"
    resume: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        if self.report_to not in REPORTERS:
            raise ConfigError(
                f"no reporter `{self.report_to}`", where="--report-to", hint=f"One of {', '.join(REPORTERS)}."
            )
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise ConfigError(
                f"{self.report_to} is not installed", where="--report-to", hint=f"pip install {self.report_to}"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
