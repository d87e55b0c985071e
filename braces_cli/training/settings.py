"""Settings of `braces train`, with defaults found by measurement (recipes/RESULTS.md). Imports no torch."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from braces_cli.core.adapter.files import check_peft_config
from braces_cli.core.attributes.options import AttributesFolder
from braces_cli.core.config import ATTRIBUTES, CHECKPOINTS, DATA, METHOD, OPTIMISATION, flag_of, option, options_of
from braces_cli.core.errors import ConfigError, near_misses
from braces_cli.core.files import user_path
from braces_cli.core.options import (
    ChatSettings,
    ModelSettings,
    OutputSettings,
    OverwriteSettings,
    SeedSettings,
    UploadSettings,
)
from braces_cli.core.schema import Kind, cut, read
from braces_cli.data.rows import Columns, parse_columns

DEFAULT_RANK = 16
# A step of Adam turns R by about lr sqrt(d): this product is constant, and the rate follows from the width d.
DEFAULT_TURN = 0.16
BASELINE_LR = 3e-3
# With the contrastive loss, gates at a higher rate close before they have found their direction.
DEFAULT_GATE_LR, DEFAULT_GATE_LR_ATTRIBUTES = 0.3, 0.1
# The entries of D are the gates of relevance to the output, without a sigmoid.
DEFAULT_DIAGONAL_LR = 0.006
DEFAULT_CONTRAST, DEFAULT_MARGIN = 0.1, 6.0
STRENGTH = "strength"
SCHEDULES = ("linear", "cosine", "constant")
# Presets of PEFT; see `training.baselines`. A config of PEFT follows `peft:`.
BASELINES = ("lora", "rslora", "dora", "pissa")
METHODS = ("braces", *BASELINES)
RELEVANCE = ("input", "output")
_PEFT = "peft:"
_METHODS = f"{'|'.join(METHODS)}|{_PEFT}CONFIG.json"
_PEFT_CONFIG: Kind[dict[str, Any]] = Kind(dict[str, Any], ConfigError, "Save a config with peft.", "config of peft")
# Settings that only one kind of method reads.
BRACES_ONLY = (
    "gate_lr", "relevance_to", "relevance_scale", "attribute_field", "strength_field", "opposites", "contrast",
    "margin",
)  # fmt: skip
BASELINE_ONLY = ("lora_alpha", "lora_targets")
# Ignoring these would train something else, so a baseline refuses them in a file, too.
_NEVER_IGNORED = ("attribute_field", "opposites", "attributes")
PACKING = ("auto", "on", "off")
REPORTERS = ("tensorboard", "wandb", "none")
# Settings that an adapter's config records.
_RECORDED = (
    "method", "rank", "relevance_to", "relevance_scale", "streaming", "packing", "max_length", "layers", "lora_alpha",
    "lora_targets", "lr", "gate_lr", "epochs", "max_steps", "batch_size", "gradient_accumulation", "warmup_steps",
    "schedule", "gradient_checkpointing", "attribute_field", "strength_field", "opposites", "contrast", "margin",
    "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainSettings(
    AttributesFolder, ChatSettings, ModelSettings, OverwriteSettings, UploadSettings, SeedSettings, OutputSettings
):
    """Inputs, method and outputs of `braces train`.

    Defaults that depend on other settings or on the base are None until `resolve`.

    Attributes:
        data: Training rows: a file, or a hub data set as id, id:split or id:subset:split. Repeatable.
        output_dir: Folder for the adapter.
        eval_data: Evaluation rows, for the loss of base and adapter. Repeatable.
        columns: Columns of the rows, such as prompt=question,completion=answer. Repeatable.
        method: Method to train; all except braces are PEFT baselines. peft:CONFIG.json is any config of PEFT.
        rank: Rank of the relevance projections, or of a baseline's update.
        relevance_to: Tensor that the value vectors are compared with: the FFN's input, as in the paper, or its output,
            an extension.
        relevance_scale: Constant factor c of the relevance scores: measured in each layer of the base, or a number; 1
            is the paper's formula.
        streaming: Read rows during training, for data larger than memory. Needs --max-steps.
        packing: Pack several examples into one row; auto: if a test on the model shows unchanged logits.
        max_length: Maximum length of an example in tokens; longer ones are truncated.
        layers: Layers to adapt, such as 8-20,24 or 1- (inclusive, from 0). Default: all.
        lora_alpha: LoRA alpha of a baseline: its update is scaled by alpha / rank. Default: twice the rank.
        lora_targets: Modules that a baseline adapts, separated by commas. Default: q_proj,v_proj. Repeatable.
        lr: Peak learning rate. Default: 0.16 / sqrt(width), for baselines 0.003.
        gate_lr: Peak learning rate of the gates. Default: 0.3; with attributes 0.1; for relevance to the output 0.006.
        epochs: Number of passes over the training data.
        max_steps: Number of optimizer steps; overrides --epochs.
        batch_size: Examples per process and forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        warmup_steps: Optimizer steps of linear warm-up; at most a quarter of all steps.
        schedule: Learning-rate schedule after the warm-up: linear or cosine decay to zero, or constant.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 30 % more time.
        attribute_field: Column with the attribute of each row. The adapter learns to be steered by these attributes.
        strength_field: Column with the strength of the attribute; 1 if a row has none.
        opposites: Two opposite attributes, trained as one axis. Repeatable.
        contrast: Weight of the contrastive loss between each row's strength and the opposite strength; takes twice the
            time. Default: 0.1 with attributes.
        margin: Margin of the contrastive loss, in nats per unit of strength: each row's log-likelihood at its strength
            must exceed that at the opposite strength by this much. Larger values steer more strongly. Default: 6.
        adapter: Adapter to continue training from: folder or hub id. Layers, rank and relevance stay the same.
        check_rows: Read and tokenise all rows, print statistics and exit. Loads no weights.
        save_steps: Optimizer steps between checkpoints; 0: no checkpoints.
        save_total_limit: Maximum number of checkpoints; older ones are deleted. 0: no limit.
        resume: Continue from the newest checkpoint in --output-dir, if there is one.
        eval_steps: Optimizer steps between evaluations on --eval-data; 0: at the end only.
        logging_steps: Optimizer steps between rows of metrics.
        report_to: Logger for metrics, in addition to metrics.jsonl.
    """

    first_options = ("data", "model", "output_dir", "method", "attribute_field")
    required = ("data",)

    data: tuple[str, ...] = option((), metavar="ROWS")
    output_dir: Path | None = option(None, outcome=False)
    eval_data: tuple[str, ...] = option((), panel=DATA, metavar="ROWS")
    columns: tuple[str, ...] = option((), panel=DATA, metavar="KEY=COLUMN,...")
    method: str = option("braces", panel=METHOD, metavar=_METHODS)
    rank: int = option(DEFAULT_RANK, min=1, panel=METHOD)
    relevance_to: str = option("input", panel=METHOD, choices=RELEVANCE)
    relevance_scale: str = option("auto", panel=METHOD, metavar="auto|NUMBER")
    streaming: bool = option(False, panel=DATA)
    packing: str = option("auto", panel=DATA, choices=PACKING)
    max_length: int = option(1024, min=2, panel=DATA, metavar="TOKENS")
    layers: str | None = option(None, panel=METHOD)
    lora_alpha: int | None = option(None, min=1, panel=METHOD)
    lora_targets: tuple[str, ...] = option((), panel=METHOD, metavar="NAME,...")
    lr: float | None = option(None, above=0, panel=OPTIMISATION)
    gate_lr: float | None = option(None, above=0, panel=OPTIMISATION)
    epochs: float = option(1.0, above=0, panel=OPTIMISATION)
    max_steps: int | None = option(None, min=1, panel=OPTIMISATION)
    batch_size: int = option(16, min=1, panel=OPTIMISATION, outcome=False)
    gradient_accumulation: int = option(1, min=1, panel=OPTIMISATION, outcome=False)
    warmup_steps: int = option(20, min=0, panel=OPTIMISATION)
    schedule: str = option("linear", panel=OPTIMISATION, choices=SCHEDULES)
    gradient_checkpointing: bool = option(False, panel=OPTIMISATION, outcome=False)
    attribute_field: str | None = option(None, panel=ATTRIBUTES)
    strength_field: str = option(STRENGTH, panel=ATTRIBUTES)
    opposites: tuple[str, ...] = option((), panel=ATTRIBUTES, metavar="A:B")
    contrast: float | None = option(None, min=0, panel=ATTRIBUTES)
    margin: float | None = option(None, min=0, panel=ATTRIBUTES)
    adapter: str | None = option(None, panel=METHOD, metavar="ADAPTER", once=True)
    check_rows: bool = option(False, panel=DATA, flag="--check", display=True)
    save_steps: int = option(500, min=0, panel=CHECKPOINTS, outcome=False)
    save_total_limit: int = option(2, min=0, panel=CHECKPOINTS, outcome=False)
    resume: bool = option(False, panel=CHECKPOINTS, outcome=False)
    eval_steps: int = option(0, min=0, panel=CHECKPOINTS, outcome=False)
    logging_steps: int = option(10, min=1, panel=CHECKPOINTS, outcome=False)
    report_to: str = option("none", panel=CHECKPOINTS, outcome=False, choices=REPORTERS)

    def __post_init__(self) -> None:
        """Set fields that have two spellings."""
        columns = self.row_columns
        object.__setattr__(self, "attribute_field", self.attribute_field or columns.attribute)
        if self.strength_field == STRENGTH and columns.strength is not None:
            object.__setattr__(self, "strength_field", columns.strength)
        names = [name.strip() for value in self.lora_targets for name in value.split(",")]
        object.__setattr__(self, "lora_targets", tuple(filter(None, names)))

    def check(self) -> None:
        """Also refuse settings that do not fit together, missing folders and missing libraries."""
        self._check_method_and_attributes()
        super().check()
        if self.output_dir is None and not (self.dry_run or self.check_rows):
            raise ConfigError("missing option", where="--output-dir", hint="See `braces train --help`.")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            hint = f"pip install {self.report_to}"
            raise ConfigError(f"{self.report_to} is not installed", where="--report-to", hint=hint)
        if self.streaming and self.max_steps is None:
            hint = "Give the number of steps with --max-steps."
            raise ConfigError("a stream has no known length", where="--streaming", hint=hint)
        if self.resume and self.overwrite:
            hint = "Give one of the two."
            raise ConfigError("--resume and --overwrite are mutually exclusive", where="--resume", hint=hint)
        _ = self.pairs, self.scale

    def _check_method_and_attributes(self) -> None:
        """Refuse options without effect, and two columns for one key.

        A recipe may contain settings of every method, so that one file serves all of them: an unused setting in a file
        is not an error, except for attributes.
        """
        baseline = self.method != "braces"
        if self.method not in METHODS and self.peft_file is None:
            expected = f"one of {', '.join(METHODS)} or {_PEFT}CONFIG.json"
            what, hint = f"`{cut(self.method)}` is not {expected}", near_misses(self.method, METHODS)
            raise ConfigError(what, where="--method", hint=hint or None)
        for name in (*self._ignored, *_NEVER_IGNORED) if baseline else self._ignored:
            source = self.given.get(name)
            if source == "command line" or (source == "file" and name in _NEVER_IGNORED):
                flag = flag_of(type(self), name)
                other = "--method braces" if name in (*BRACES_ONLY, *_NEVER_IGNORED) else "--method lora"
                hint = f"Leave it out, or use {other}."
                raise ConfigError(f"{flag} has no effect with --method {self.method}", where=flag, hint=hint)
        for name in ("attribute_field", "adapter") if baseline else ():
            if getattr(self, name) is not None:
                what = "be trained on attributes" if name == "attribute_field" else "continue from an adapter of braces"
                hint = f"Leave out {flag_of(type(self), name)}, or train with --method braces."
                raise ConfigError(f"{self.method} cannot {what}", where="--method", hint=hint)
        _ = self.peft_options
        columns = self.row_columns
        for key, name in (("attribute", "attribute_field"), ("strength", "strength_field")):
            column, other = getattr(columns, key), getattr(self, name)
            if column not in (None, other):
                hint = f"Leave out {flag_of(type(self), name)}, or `{key}` of --columns."
                raise ConfigError(f"two columns for `{key}`: {column} and {other}", where="--columns", hint=hint)
        unused = {"opposites": (), "strength_field": STRENGTH, "attributes": None, "contrast": None}
        for name, value in unused.items() if self.attribute_field is None and not baseline else ():
            if getattr(self, name) not in (value, 0):
                hint = "Name the column of each row's attribute with --attribute-field."
                raise ConfigError("no attributes are trained", where=flag_of(type(self), name), hint=hint)
        contrastive = self.attribute_field is not None if self.contrast is None else self.contrast > 0
        if self.margin is not None and not contrastive and "margin" in self.given:
            hint = "It needs --attribute-field, and a --contrast above 0."
            raise ConfigError("there is no contrastive loss", where="--margin", hint=hint)

    def resolve(self, width: int, context: int, **inherited: Any) -> Self:
        """Settings with every default filled in; a run changes its settings only here.

        Args:
            width: d of the base.
            context: maximum tokens of the base.
            inherited: settings of the adapter to continue from.
        """
        trained = self.attribute_field is not None
        contrast = (DEFAULT_CONTRAST if trained else 0.0) if self.contrast is None else self.contrast
        lr = BASELINE_LR if self.method != "braces" else float(f"{DEFAULT_TURN / math.sqrt(width):.3g}")
        gate_lr = DEFAULT_GATE_LR_ATTRIBUTES if trained else DEFAULT_GATE_LR
        if inherited.get("relevance_to", self.relevance_to) == "output":
            gate_lr = DEFAULT_DIAGONAL_LR
        return replace(
            self,
            contrast=contrast,
            margin=DEFAULT_MARGIN if contrast and self.margin is None else self.margin,
            lr=self.lr or lr,
            gate_lr=self.gate_lr or gate_lr,
            max_length=min(self.max_length, context),
            **inherited,
        )

    @property
    def peft_file(self) -> Path | None:
        """Path of a config of PEFT that is the method."""
        return user_path(self.method.removeprefix(_PEFT)) if self.method.startswith(_PEFT) else None

    @cached_property
    def peft_options(self) -> dict[str, Any]:
        """Content of `peft_file`, read once; empty for other methods."""
        if self.peft_file is None:
            return {}
        options = read(_PEFT_CONFIG, self.peft_file)
        hint = "Use a method that changes layers, such as LORA, IA3 or LOKR."
        check_peft_config(options, str(self.peft_file), ConfigError, hint)
        return options

    @property
    def _ignored(self) -> tuple[str, ...]:
        """Names of settings that the method does not read."""
        if self.method == "braces":
            return BASELINE_ONLY
        return BRACES_ONLY if self.peft_file is None else (*BRACES_ONLY, *BASELINE_ONLY, "rank", "layers")

    @property
    def scale(self) -> float | None:
        """`relevance_scale` as a number; None if it is measured."""
        text = self.relevance_scale
        try:
            number = None if text == "auto" else float(text)
        except ValueError:
            number = 0.0
        if number is not None and not 0 < number < math.inf:
            hint = "Give auto or a positive number, such as 1."
            raise ConfigError(f"`{text}` is not a scale", where="--relevance-scale", hint=hint)
        return number

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """`opposites` as pairs of names."""
        pairs = []
        for value in self.opposites:
            one, _, other = (part.strip() for part in value.partition(":"))
            if not (one and other) or one == other:
                raise ConfigError(f"`{value}` is not A:B", where="--opposites", hint="Such as positive:negative.")
            pairs.append((one, other))
        names = [name for pair in pairs for name in pair]
        if len(set(names)) < len(names):
            raise ConfigError("an attribute is in two pairs", where="--opposites", hint="Each can have one opposite.")
        return tuple(pairs)

    @property
    def row_columns(self) -> Columns:
        """`columns`, parsed."""
        return parse_columns(self.columns)

    def recorded(self) -> dict[str, Any]:
        """Settings that the method reads, as an adapter's config records them."""
        resolved = {**self.resolved(), "opposites": [list(pair) for pair in self.pairs]}
        return {name: resolved[name] for name in _RECORDED if name not in self._ignored}

    def unused(self) -> set[str]:
        """Names of settings that have no effect with the other settings."""
        names = set(self._ignored)
        if self.attribute_field is None:
            names |= {"strength_field", "opposites", "contrast", "margin", "attributes"}
        if self.max_steps is not None:
            names.add("epochs")
        if not self.eval_data:
            names.add("eval_steps")
        if not self.save_steps:
            names.add("save_total_limit")
        return names

    def identity(self, processes: int) -> dict[str, Any]:
        """Settings that the outcome depends on; of batches and processes only the number of examples of a step."""
        resolved, options = self.resolved(), options_of(type(self))
        step = self.batch_size * self.gradient_accumulation * processes
        found = {name: resolved[name] for name in resolved if options[name].outcome}
        return {**found, "examples_per_step": step, "peft_config": self.peft_options}
