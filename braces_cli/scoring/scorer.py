"""The interface of scorers: texts -> verdicts about a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from braces_cli.core.utils.errors import BracesError


@dataclass(frozen=True)
class TextScore:
    """About one text: `value` grows with the strength of the label, `has` says whether the text counts as having it."""

    value: float
    has: bool


class Scorer(Protocol):
    """Scores texts for labels.

    Attributes:
        name: as the user gave it.
        labels: labels that `judge` knows; none where it takes any.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        """A score of each text.

        Raises:
            BracesError: it cannot score.
        """
        ...


def checked(name: str, values: Sequence[float]) -> Sequence[float]:
    """The values, all of them finite.

    Raises:
        BracesError: one is not.
    """
    bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        raise BracesError(f"{name} gave {values[bad]} for text {bad}", hint="A text without a score is not scored 0.")
    return values
