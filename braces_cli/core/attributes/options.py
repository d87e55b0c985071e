"""Options of every command that steers by attributes. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite
from pathlib import Path

from braces_cli.core.attributes.files import check_attributes
from braces_cli.core.attributes.words import check_name
from braces_cli.core.config import ATTRIBUTES, Settings, option
from braces_cli.core.errors import ConfigError

SCOPES = ("all", "prompt", "generated")
# Strengths in one list; more are a typo in the step.
_MOST = 200


@dataclass(frozen=True, kw_only=True)
class AttributesFolder(Settings):
    """Folder of attributes.

    Attributes:
        attributes: Folder with attribute files written by attr-build.
    """

    attributes: Path | None = option(None, panel=ATTRIBUTES)

    def check(self) -> None:
        """Refuse a folder without attributes."""
        super().check()
        check_attributes(self.attributes)


@dataclass(frozen=True, kw_only=True)
class SteeredTokens(Settings):
    """Tokens that attributes steer.

    Attributes:
        scope: Tokens to steer: all, those of the prompt (in a chat, of its history), or the generated ones, beginning
            with the first as input.
    """

    scope: str = option("all", panel=ATTRIBUTES, choices=SCOPES)


@dataclass(frozen=True, kw_only=True)
class AttributeNames(AttributesFolder):
    """Attributes to steer by.

    Attributes:
        attribute: Name of an attribute to steer by. Repeatable.
    """

    attribute: tuple[str, ...] = option((), metavar="NAME", panel=ATTRIBUTES)

    def check(self) -> None:
        """Refuse names that no attribute can have."""
        super().check()
        for name in self.attribute:
            check_name(name)


@dataclass(frozen=True, kw_only=True)
class AttributeSettings(AttributeNames):
    """Attributes to steer by, with their strengths.

    Attributes:
        s: Strength; the k-th belongs to the k-th --attribute. Default: 1.
    """

    s: tuple[float, ...] = option((), metavar="STRENGTH", panel=ATTRIBUTES)

    def check(self) -> None:
        """Refuse strengths that do not match the attributes."""
        super().check()
        _ = self.strengths

    @property
    def strengths(self) -> dict[str, float]:
        """Name -> strength."""
        return dict(zip(self.attribute, strengths(self.attribute, self.s), strict=True))


def strengths(names: Sequence[str], s: Sequence[float]) -> list[float]:
    """Return the strength of each attribute in `--attribute`, from `--s`.

    Raises:
        ConfigError: a duplicate name, or another number of strengths than of names.
    """
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is named twice", where="--attribute", hint="Give each once, with one --s.")
    if len(s) not in (0, len(names)):
        hint = "The k-th --s belongs to the k-th --attribute; give one for each, or no --s."
        if not names:
            hint = "Name the attribute with --attribute; `braces attr-build --list` shows the built-in ones."
        raise ConfigError(f"{len(s)} strengths for {len(names)} attributes", where="--s", hint=hint)
    return list(s) or [1.0] * len(names)


def strength_points(names: Sequence[str], values: Sequence[str]) -> list[dict[str, float]]:
    """Return name -> strength of each point if every `--s` can be a list; empty without attributes.

    The k-th point has the k-th strength of each attribute. An attribute with one strength has it at all points.

    Raises:
        ConfigError: lists of different lengths, or what `parse_strengths` and `strengths` refuse.
    """
    columns = [parse_strengths(value, "--s") for value in values]
    strengths(names, [column[0] for column in columns])
    if not names:
        return []
    columns = columns or [[1.0] for _ in names]
    count = max(map(len, columns))
    if any(len(column) not in (1, count) for column in columns):
        hint = "Give all attributes the same number of strengths, or one."
        raise ConfigError(f"lists of {' and '.join(str(len(c)) for c in columns)} strengths", where="--s", hint=hint)
    return [{name: column[k % len(column)] for name, column in zip(names, columns, strict=True)} for k in range(count)]


def parse_strengths(value: str, where: str = "--sweep") -> list[float]:
    """Return the numbers of `FROM:TO:STEP` (both ends included), or of a list with commas.

    Args:
        value: the text.
        where: option of the value.

    Raises:
        ConfigError: another form, no number, or more than 200.
    """
    hint = f"Such as {where} -4:4:1 or {where} -3,0,3."
    refused = ConfigError(f"`{value}` is not FROM:TO:STEP", where=where, hint=hint)
    try:
        numbers = [float(part) for part in value.split(":" if ":" in value else ",")]
    except ValueError as error:
        raise refused from error
    if not all(map(isfinite, numbers)) or (":" in value and len(numbers) != 3):
        raise refused
    if ":" not in value:
        return list(dict.fromkeys(numbers))
    first, last, step = numbers
    if step == 0 or (last - first) * step < 0 or abs(last - first) / abs(step) >= _MOST:
        raise ConfigError(f"`{value}` has no points, or more than {_MOST}", where=where, hint=hint)
    count = floor((last - first) / step + 1e-9) + 1
    # Rounded, so that -0.3:0.3:0.1 contains 0 exactly.
    return [round(first + index * step, 10) + 0.0 for index in range(count)]
