"""Adapters that can be put on a base and taken off again: our own, and those that peft wrote (LoRA and its like).

peft changes modules of the base in place and puts the very same ones back, so that one loaded base serves all.

Which systems an evaluation measures: the base, each adapter, and these steered at every strength asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from safetensors import SafetensorError

from braces_cli.core.adapter import model as sessions
from braces_cli.core.adapter.files import (
    ANY_CONFIG,
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredAdapter,
    adapter_folder,
    adapter_hash,
    read_adapter,
)
from braces_cli.core.adapter.model import Session, attach_stored
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError, ModelError, first_line
from braces_cli.core.files import path_exists
from braces_cli.core.models.weights import check_finite
from braces_cli.core.schema import Kind, Name, check, read
from braces_cli.evaluation.settings import EvalSettings

BRACES = "braces"
# What peft raises for files that are damaged, or that do not fit the base.
_PEFT_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError
)  # fmt: skip
# Methods of peft that live beside the model rather than in its layers.
_PROMPT_LEARNING = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
}


class PeftConfig(TypedDict):
    """What is read of the config of peft; peft reads the rest, and its faults are told by `_misfit`."""

    peft_type: str
    base_model_name_or_path: NotRequired[Name | None]
    revision: NotRequired[Name | None]


_PEFT = Kind(PeftConfig, ModelError, "The file is damaged; save the adapter again.")


@dataclass(frozen=True)
class EvalAdapter:
    """An adapter on disk.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        method: `braces`, else peft's name in lower case (`lora`, `ia3`, ...).
        base: name of the base it was trained on; `revision` of it, where known.
        sha256: over its config and its weights.
        chat_template: whether it was trained with the tokenizer's chat template; None where it does not say.
        stored: of braces: its files, read and checked; None for one of peft's.
    """

    name: str
    folder: Path
    method: str
    base: str | None
    revision: str | None
    sha256: str
    chat_template: bool | None = None
    stored: StoredAdapter | None = None


def find_eval_adapter(name: str) -> EvalAdapter:
    """Look at an adapter given as a folder or hub id, without loading a model.

    Raises:
        ConfigError: a peft adapter, and peft is not installed.
        ModelError: no adapter, a damaged one, or one that cannot be taken off a base again.
    """
    folder = adapter_folder(name)
    peft_config = _peft_config(folder)
    if peft_config is None:
        return _of_braces(read_adapter(name, folder))
    if importlib.util.find_spec("peft") is None:
        hint = "Install it with: pip install peft"
        raise ConfigError("this adapter needs peft, which is not installed", where=name, hint=hint)
    kind = peft_config["peft_type"]
    if kind in _PROMPT_LEARNING:
        hint = "Measure it with lm-eval: --model hf --model_args pretrained=...,peft=..."
        raise ModelError(f"{kind} is not in the model's layers, so it cannot be switched", where=name, hint=hint)
    if not (folder / WEIGHTS_FILE).is_file():
        hint = f"Save it with peft as {WEIGHTS_FILE}; other formats can run code when loaded."
        raise ModelError(f"no {WEIGHTS_FILE} here", where=str(folder), hint=hint)
    base, revision = peft_config.get("base_model_name_or_path"), peft_config.get("revision")
    return EvalAdapter(name, folder, kind.lower(), base, revision, adapter_hash(folder))


def _of_braces(stored: StoredAdapter) -> EvalAdapter:
    config, _ = stored.config, stored.tensors  # damaged weights are an error now, not after an hour of evaluation
    trained = config.training.get("chat_template")
    template = None if trained is None else bool(trained)
    base, revision = config.base_model_name_or_path, config.revision
    return EvalAdapter(
        stored.name, stored.folder, BRACES, base, revision, adapter_hash(stored.folder), template, stored
    )


@contextlib.contextmanager
def attached(session: Session, adapter: EvalAdapter | None) -> Iterator[None]:
    """Have the adapter on the open base inside the `with` block, and the base as it was behind it.

    Raises:
        ModelError: it does not fit this base.
    """
    if adapter is None:
        yield
    elif adapter.stored is not None:
        with sessions.attached(session, adapter.stored):
            yield
    else:
        with _peft(session.base.model, adapter):
            yield


def check_fit(session: Session, adapters: Sequence[EvalAdapter]) -> None:
    """Put each adapter on once: one that does not fit must not cost an evaluation first.

    Raises:
        ModelError: one does not fit.
    """
    fingerprint = session.base.fingerprint(session.ffns)
    for adapter in adapters:
        if adapter.stored is not None:
            attach_stored(session.base.model, adapter.stored, fingerprint).detach()
        else:
            with _peft(session.base.model, adapter):
                pass


@contextlib.contextmanager
def _peft(model: Any, adapter: EvalAdapter) -> Iterator[None]:
    modules = dict(model.named_modules())
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wrapped = None
    try:
        wrapped = _load_peft(model, adapter)
        yield
    finally:
        if wrapped is not None:
            wrapped.unload()
        # Where loading failed half-way, or the adapter brought whole layers (`modules_to_save`, to which peft unloads),
        # the base's own are put back.
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            if name and getattr(modules[parent], leaf, None) is not module:
                setattr(modules[parent], leaf, module)
        model.__dict__.pop("peft_config", None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def _load_peft(model: Any, adapter: EvalAdapter) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter.folder), use_safetensors=True)
    except _PEFT_ERRORS as error:
        raise _misfit(adapter, first_line(error)) from error
    missing = [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
    if missing:
        raise _misfit(adapter, "the file does not hold all of its weights")
    if not hasattr(wrapped.base_model, "unload"):
        hint = "Measure it with lm-eval: --model hf --model_args pretrained=...,peft=..."
        raise ModelError(f"{adapter.method} cannot be taken off a base again", where=adapter.name, hint=hint)
    check_finite(get_peft_model_state_dict(wrapped, save_embedding_layers=False), adapter.name)
    wrapped.eval()
    return wrapped


def _misfit(adapter: EvalAdapter, what: str) -> ModelError:
    hint = f"It was trained on {adapter.base}." if adapter.base else "Was it trained on this base?"
    return ModelError(f"this {adapter.method} adapter does not fit the base: {what}", where=adapter.name, hint=hint)


def _peft_config(folder: Path) -> PeftConfig | None:
    """peft's own description of the adapter in `folder`; None where there is none.

    Raises:
        ModelError: the adapter's config is damaged.
    """
    path = folder / CONFIG_FILE
    if not path_exists(path):
        return None
    raw = read(ANY_CONFIG, path)
    return check(_PEFT, raw, str(path)) if "peft_type" in raw and raw.get("method") != BRACES else None


@dataclass(frozen=True)
class SystemPlan:
    """A system that is to be measured.

    Attributes:
        label: its name in the result.
        adapter: None for the base.
        terms: attributes with their strengths, none where it is not steered.
    """

    label: str
    adapter: EvalAdapter | None
    terms: tuple[tuple[Attribute, float], ...] = ()

    @property
    def strengths(self) -> dict[str, float]:
        """Name of each attribute -> its strength."""
        return {attribute.name: s for attribute, s in self.terms}


def check_systems(adapters: Sequence[str], settings: EvalSettings) -> None:
    """Refuse settings that leave nothing to measure.

    Raises:
        ConfigError: they do.
    """
    if settings.no_base and not adapters and not settings.points:
        raise ConfigError("nothing to evaluate", where="--no-base", hint="Give an --adapter, or leave --no-base out.")


def plan_systems(session: Session, adapters: Sequence[EvalAdapter], settings: EvalSettings) -> list[SystemPlan]:
    """The systems in the order of the result: the base; each adapter, and behind it the same adapter steered.

    Without an adapter it is the base that is steered.

    Raises:
        ConfigError: an attribute that is unknown.
        ModelError: one that belongs to another base.
    """
    labels = _labels(adapters)
    plans = [] if settings.no_base else [SystemPlan("base", None)]
    for label, adapter in zip(labels, adapters, strict=True):
        plans += [SystemPlan(label, adapter), *_steered(session, label, adapter, settings)]
    return plans if adapters else [*plans, *_steered(session, "base", None, settings)]


def _steered(session: Session, label: str, adapter: EvalAdapter | None, settings: EvalSettings) -> list[SystemPlan]:
    if not settings.points:
        return []
    with ExitStack() as stack:
        # Attributes can lie in the folder of an adapter of ours; under one of peft they would not be those of the base.
        if adapter is not None and adapter.method == BRACES:
            stack.enter_context(attached(session, adapter))
        attributes = {name: find_attribute(session, name, settings.attributes) for name in settings.attribute}
    return [
        SystemPlan(
            f"{label}, {' '.join(f'{name} {s:+g}' for name, s in point.items())}",
            adapter,
            tuple((attributes[name], s) for name, s in point.items()),
        )
        for point in settings.points
    ]


def _labels(adapters: Sequence[EvalAdapter]) -> list[str]:
    """Names of the adapters: their folders' where that tells them apart, another one for each."""
    short = [Path(each.name).name or each.name for each in adapters]
    labels: list[str] = []
    for number, (brief, each) in enumerate(zip(short, adapters, strict=True), 1):
        label = brief if short.count(brief) == 1 and brief != "base" else each.name
        labels.append(label if label not in (*labels, "base") else f"{label} ({number})")
    return labels
