"""Which strength belongs to which attribute. Light: no torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from braces_cli.core.attributes.word_lists import check_name
from braces_cli.core.utils.errors import ConfigError


def pair_strengths(names: Sequence[str], s: Sequence[float], *, first_is_swept: bool = False) -> dict[str, float]:
    """Name -> strength: the k-th strength belongs to the k-th name; without strengths each is 1.

    Args:
        first_is_swept: the first name gets no strength and is left out of the result, since a sweep tries several.

    Raises:
        ConfigError: what cannot be a name, a name that comes twice, another number of strengths than of names, or a
            strength that is not finite.
    """
    for name in names:
        check_name(name)
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is named twice", where="--attribute", hint="Give each once, with one --s.")
    kind, hint = "attributes", "The k-th --s belongs to the k-th --attribute; give one for each, or none at all."
    if first_is_swept:
        names = names[1:]
        kind = "other attributes"
        hint = "The first attribute is swept; give one --s for each of the others, or none at all."
    if len(s) not in (0, len(names)):
        raise ConfigError(f"{len(s)} strengths for {len(names)} {kind}", where="--s", hint=hint)
    for value in s:
        if not math.isfinite(value):
            raise ConfigError(f"{value} is no finite number", where="--s", hint="Such as --s 3.0 or --s -1.5.")
    return dict(zip(names, s or [1.0] * len(names), strict=True))
