"""Which systems an evaluation measures: the base, each adapter, and these steered at every strength asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from braces_cli.core.attributes.attribute import Attribute
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError
from braces_cli.evaluation.adapter_switching import BRACES, EvalAdapter, attached
from braces_cli.evaluation.settings import EvalSettings


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
