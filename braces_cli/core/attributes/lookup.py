"""Where an attribute of a name comes from: files of the user's, the adapter's own, and the built-in word lists."""

from __future__ import annotations

import logging
from pathlib import Path

from braces_cli.core.attributes.attribute import Attribute, built_in_attribute, load_attributes, without_direction
from braces_cli.core.attributes.built_in_cache import cached
from braces_cli.core.attributes.listing import TRAINED_FILE, check_attributes
from braces_cli.core.attributes.odds import default_reduction
from braces_cli.core.attributes.word_lists import OTHER_FILES, built_in, check_name
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError, near_misses
from braces_cli.core.utils.paths import path_exists
from braces_cli.core.utils.progress import Report, silent

logger = logging.getLogger("braces")


def find_attribute(
    session: Session, name: str, folder: Path | None, report: Report = silent, for_steering: bool = True
) -> Attribute:
    """Look an attribute up: in `folder`, in the adapter's folder, then build it from the built-in word list.

    Of a built-in list that has an opposite, p is half the difference of the two: what evaluative words share against
    neutral ones is most of a difference to these, and says nothing of good or bad.

    Args:
        for_steering: also compute the steering vector (`core.attributes.intervention`), not only p.

    Raises:
        ConfigError: unknown everywhere; names what is known. Or `folder` cannot be read.
        ModelError: found, but damaged or of another base.
    """
    check_name(name)
    check_attributes(folder)
    for path in _files(session, folder, name):
        attributes = load_attributes(path, session)
        if name in attributes:
            # What an adapter was trained with goes through it, even where its file came with a direction to push along.
            trained = path.name == TRAINED_FILE
            return without_direction(attributes[name]) if trained else attributes[name]
    lists = built_in()
    if name in lists:
        if folder is not None:
            logger.warning("%s: no attribute `%s` there; its built-in word list is used", folder, name)
        reduction = default_reduction(session) if for_steering else "mean"
        return cached(session, name, reduction, lambda: built_in_attribute(session, name, report, reduction=reduction))
    known = known_attributes(session, folder)
    hint = f"{near_misses(name, known)} Known: {', '.join(known)}. Build others with braces attr-build.".strip()
    raise ConfigError(f"unknown attribute `{name}`", where="--attribute", hint=hint)


def known_attributes(session: Session, folder: Path | None) -> list[str]:
    """Every name that `find_attribute` would find.

    Raises:
        ConfigError: `folder` cannot be read.
    """
    check_attributes(folder)
    trained = session.config.attributes if session.config is not None else []
    places = [place for place in (folder, session.folder) if place is not None]
    files = {path.stem for place in places for path in place.glob("*.safetensors")} - OTHER_FILES
    return sorted({*built_in(), *trained, *files})


def _files(session: Session, folder: Path | None, name: str) -> list[Path]:
    """Where an attribute may lie, in the order of looking: whatever is there, readable or not."""
    own = [] if name in OTHER_FILES else [f"{name}.safetensors"]
    places = [] if folder is None else [folder / file for file in own]
    if session.folder is not None:
        places += [session.folder / file for file in (*own, TRAINED_FILE)]
    return [path for path in places if path_exists(path)]
