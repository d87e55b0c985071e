"""What a training run is asked to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from braces_cli.core.method.relevance_forms import FORMS
from braces_cli.core.utils.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant")
INITS = ("random", "values", "inputs")
SCALES = ("paper", "auto")
# Those of peft; see `training.peft_baselines`.
BASELINES = ("lora", "rslora", "dora", "pissa")
METHODS = ("braces", *BASELINES)
# Settings that only one kind of method reads.
BRACES_ONLY = (
    "gate_lr",
    "init",
    "scale",
    "relevance",
    "attribute_field",
    "strength_field",
    "opposites",
    "contrast",
    "margin",
)
BASELINE_ONLY = ("lora_alpha", "lora_targets")
# Peak learning rates where none is given, by measurement (recipes/LOG.md). A step of Adam turns R by about lr sqrt(d),
# so it is this product that is held, and the rate follows from the width d.
DEFAULT_TURN = 0.16
BASELINE_LR = 1e-3
# A contrast of attributes shuts gates that move too fast before it has found its direction.
DEFAULT_GATE_LR, DEFAULT_GATE_LR_ATTRIBUTES = 0.3, 0.1
# Of the coefficients of `signed` and `untied`.
DEFAULT_COEFFICIENT_LR = 0.1
# Of a run with attributes, by measurement as well.
DEFAULT_CONTRAST, DEFAULT_MARGIN = 0.1, 6.0
PACKING = ("auto", "on", "off")
REPORTERS = ("tensorboard", "wandb", "none")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run.

    Attributes:
        rank: d_r.
        layers: indices of the layers to adapt; None is all.
        lr: peak learning rate of the projections; None is the default at the width of the model, see `at_width`.
        gate_lr: peak learning rate of the gates. They start nearly shut, and so do the gradients of the projections,
            so they need a rate of their own; None is the default, which is lower where attributes are trained.
        epochs: passes over the data, unless `max_steps` is set.
        max_steps: optimizer steps.
        batch_size: examples a process and step.
        gradient_accumulation: batches an optimizer step.
        warmup_steps: optimizer steps until the peak rate.
        schedule: of the rate after the warm-up: linear or cosine to zero, or constant.
        max_length: tokens of an example that are kept.
        gradient_checkpointing: recompute activations in the backward pass, and keep no products of W_V
            (`core.method.value_gram`): less memory, about a third more time.
        seed: of the projections' start and the order of examples.
        attribute_field: column of the rows' attributes; None: attributes are not trained.
        strength_field: column of their strengths.
        opposites: pairs of attributes that are the two ends of one axis.
        contrast: weight of telling each row's strength from its opposite, see `training.contrastive_loss`; 0 is the
            paper's loss; None is the default where attributes are trained, else 0.
        margin: by how much they are told apart, in nats a row and unit of strength: the larger, the stronger the
            steering; None is the default, and stays None without a contrast.
        method: `braces`, or a baseline.
        init: where the projections start, see `training.initialization`.
        scale: `paper`, or `auto` for a fixed scalar per layer that makes up for the size of the base's weights.
        relevance: form of relevance, see `core.method.relevance_forms`.
        lora_alpha: of a baseline, whose update is multiplied by alpha / rank; None is twice the rank.
        lora_targets: names of the modules that a baseline adapts; empty is the queries and values.
        packing: several examples a row: auto (where a probe shows that it changes nothing), on or off.
        streaming: rows are read as they are needed; needs `max_steps`.
        chat_template: some rows are chats, written by the tokenizer's template.
    """

    rank: int = 16
    layers: list[int] | None = None
    lr: float | None = None
    gate_lr: float | None = None
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
    contrast: float | None = None
    margin: float | None = None
    method: str = "braces"
    init: str = "random"
    scale: str = "paper"
    relevance: str = "paper"
    lora_alpha: int | None = None
    lora_targets: tuple[str, ...] = ()
    packing: str = "auto"
    streaming: bool = False
    chat_template: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "gate_lr", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"must be a positive number, not {value}", where=_option(name))
        choices = {
            "relevance": FORMS,
            "schedule": SCHEDULES,
            "method": METHODS,
            "init": INITS,
            "scale": SCALES,
            "packing": PACKING,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                hint = f"One of {', '.join(known)}."
                raise ConfigError(f"no {name} `{getattr(self, name)}`", where=_option(name), hint=hint)
        if self.gate_lr is None:
            rate = DEFAULT_GATE_LR if self.attribute_field is None else DEFAULT_GATE_LR_ATTRIBUTES
            rate = rate if self.relevance == "paper" else DEFAULT_COEFFICIENT_LR
            object.__setattr__(self, "gate_lr", rate)
        if self.contrast is None:
            object.__setattr__(self, "contrast", DEFAULT_CONTRAST if self.attribute_field is not None else 0.0)
        for name in ("contrast", "margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"must be nought or a positive number, is {value}", where=_option(name))
        if self.contrast and self.attribute_field is None:
            hint = "Name the column of each row's attribute with --attribute-field."
            raise ConfigError("no attributes are trained", where="--contrast", hint=hint)
        if self.contrast and self.margin is None:
            object.__setattr__(self, "margin", DEFAULT_MARGIN)
        if self.margin is not None and not self.contrast:
            hint = "It needs --attribute-field, and a --contrast above 0."
            raise ConfigError("no strengths are told apart by it", where="--margin", hint=hint)
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ConfigError(f"must be at least 1, not {self.lora_alpha}", where="--lora-alpha")
        if self.method != "braces" and self.attribute_field is not None:
            hint = "Leave out --attribute-field, or train with --method braces."
            raise ConfigError(f"{self.method} cannot be trained on attributes", where="--method", hint=hint)
        if self.streaming and self.max_steps is None:
            raise ConfigError(
                "a stream has no known length", where="--streaming", hint="Say how long to train with --max-steps."
            )

    def at_width(self, width: int) -> TrainSettings:
        """The same with a rate, where none was given: for a model of d = `width`, to three digits."""
        if self.lr is not None:
            return self
        rate = DEFAULT_TURN / math.sqrt(width) if self.method == "braces" else BASELINE_LR
        return replace(self, lr=float(f"{rate:.3g}"))

    def recorded(self) -> dict[str, Any]:
        """What the method reads: the settings that explain an adapter."""
        other = BASELINE_ONLY if self.method == "braces" else BRACES_ONLY
        return {name: value for name, value in asdict(self).items() if name not in other}


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
