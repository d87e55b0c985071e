"""Options of every command that is steered by attributes, declared once. Light: no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from braces_cli.core.attributes.listing import check_folder
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import ATTRIBUTES, Settings, option


@dataclass(frozen=True, kw_only=True)
class AttributeSettings(Settings):
    """Which attributes steer, and how strongly."""

    attribute: tuple[str, ...] = option((), help="Name of an attribute to steer by. Repeatable.", metavar="NAME")
    s: tuple[float, ...] = option(
        (), help="Strength; the k-th belongs to the k-th --attribute. Default 1.", metavar="STRENGTH"
    )
    attributes: Path | None = option(None, help="Folder that attr-build wrote.", panel=ATTRIBUTES)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Before a model is loaded.
        check_folder(self.attributes)

    @property
    def strengths(self) -> dict[str, float]:
        """Name -> strength.

        Raises:
            ConfigError: see `strengths`.
        """
        return dict(zip(self.attribute, strengths(self.attribute, self.s), strict=True))


def strengths(names: Sequence[str], s: Sequence[float]) -> list[float]:
    """The strength of each attribute in `--attribute`, from `--s`.

    Raises:
        ConfigError: a name comes twice, the numbers do not match, or one is not finite.
    """
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is named twice", where="--attribute", hint="Give each once, with one --s.")
    if len(s) not in (0, len(names)):
        hint = "The k-th --s belongs to the k-th --attribute; give one for each, or none at all."
        raise ConfigError(f"{len(s)} strengths for {len(names)} attributes", where="--s", hint=hint)
    for value in s:
        if not isfinite(value):
            raise ConfigError(f"{value} is no finite number", where="--s", hint="Such as --s 3.0 or --s -1.5.")
    return list(s) or [1.0] * len(names)
