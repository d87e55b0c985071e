"""Settings of training with attributes, each with its default and help text. Light: no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import ATTRIBUTES, SeedSettings, flag_of, option

# By measurement (recipes/RESULTS.md).
DEFAULT_CONTRAST, DEFAULT_MARGIN = 0.1, 6.0
# Column of a row's strength where no other is named.
STRENGTH = "strength"


@dataclass(frozen=True, kw_only=True)
class AttributeTrainingSettings(SeedSettings):
    """How an adapter learns to be steered.

    Defaults that depend on other settings are None on the command line, and filled in by `_fill_attributes`.
    """

    attribute_field: str | None = option(
        None,
        help="Column with the attribute of each row. The adapter learns to be steered by these attributes.",
        panel=ATTRIBUTES,
    )
    strength_field: str = option(
        STRENGTH, help="Column with the strength of the attribute; 1 if a row has none.", panel=ATTRIBUTES
    )
    opposites: tuple[str, ...] = option(
        (), help="Two opposite attributes, trained as one axis. Repeatable.", panel=ATTRIBUTES, metavar="A:B"
    )
    contrast: float | None = option(
        None,
        help="Weight of the contrastive loss between each row's strength and the opposite strength; takes "
        f"twice the time. Default: {DEFAULT_CONTRAST:g} with attributes.",
        panel=ATTRIBUTES,
    )
    margin: float | None = option(
        None,
        help="Margin of the contrastive loss, in nats per unit of strength: each row's log-likelihood at its strength "
        "must exceed that at the opposite strength by this much. Larger values steer more strongly. "
        f"Default: {DEFAULT_MARGIN:g}.",
        panel=ATTRIBUTES,
    )

    def _fill_attributes(self) -> None:
        """Check what only a run with attributes reads, and fill in its defaults."""
        trained = self.attribute_field is not None
        hint = "Name the column of each row's attribute with --attribute-field."
        if self.opposites and not trained:
            raise ConfigError("no attributes are trained", where="--opposites", hint=hint)
        if self.strength_field != STRENGTH and not trained:
            raise ConfigError("a strength without an attribute", where="--strength-field", hint=hint)
        parse_opposites(self.opposites)
        for name in ("contrast", "margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"must be zero or a positive number, not {value}", where=self._flag(name))
        if self.contrast is None:
            self._set(contrast=DEFAULT_CONTRAST if trained else 0.0)
        if self.contrast and not trained:
            raise ConfigError("no attributes are trained", where="--contrast", hint=hint)
        if self.contrast and self.margin is None:
            self._set(margin=DEFAULT_MARGIN)
        if self.margin is not None and not self.contrast:
            hint = "It needs --attribute-field, and a --contrast above 0."
            raise ConfigError("there is no contrastive loss", where="--margin", hint=hint)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _flag(self, name: str) -> str:
        return flag_of(type(self), name)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """`opposites`, parsed."""
        return parse_opposites(self.opposites)


def parse_opposites(values: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`A:B` of each value.

    Raises:
        ConfigError: no such form, or a name in two pairs.
    """
    pairs = []
    for value in values:
        one, colon, other = (part.strip() for part in value.partition(":"))
        if not (one and colon and other) or one == other:
            raise ConfigError(f"`{value}` is not A:B", where="--opposites", hint="Such as positive:negative.")
        pairs.append((one, other))
    names = [name for pair in pairs for name in pair]
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is in two pairs", where="--opposites", hint="Each can have one opposite.")
    return tuple(pairs)
