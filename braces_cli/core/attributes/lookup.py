"""Built-in attributes of bases that were used before, kept in a folder of the user's.

Pooling words and following gradients takes as long as generating dozens of texts, and gives the same for the same files
of weights. A file is found by what it was made from: the files of the base by name, size and time, its number format
and device, the words and texts that come with braces, and the versions of what computes. What cannot be read is made
anew; a folder that cannot be written to is done without, and so is the cache where weights were changed in memory.

Where an attribute of a name comes from: files of the user's, the adapter's own, and the built-in word lists.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.directions import RIDGE, default_reduction, neutral_prompts
from braces_cli.core.attributes.files import TRAINED_FILE, check_attributes
from braces_cli.core.attributes.pooling import STEERING_SHARE
from braces_cli.core.attributes.vector import (
    Attribute,
    built_in_attribute,
    load_attributes,
    save_attributes,
    without_direction,
)
from braces_cli.core.attributes.words import OPPOSITES, OTHER_FILES, REFERENCE, built_in, check_name, neutral_texts
from braces_cli.core.errors import BracesError, ConfigError, near_misses
from braces_cli.core.files import cache_folder, path_exists, value_hash, versions
from braces_cli.core.models.residual import GAIN_STEP
from braces_cli.core.progress import Report, silent

logger = logging.getLogger("braces")

# Files kept; beyond these the ones used longest ago go. Three numbers a layer and
# channel: 25 KB for six layers of width 320, 1.6 MB for those of Llama-3-8B.
_KEPT = 100


def cached(session: Session, name: str, reduction: str, build: Callable[[], Attribute]) -> Attribute:
    """The built-in attribute of that name, read where it was built before, else built and kept.

    Args:
        reduction: how it is made, as in `core.attributes.attribute.built_in_attribute`.
    """
    path = _place(session, name, reduction)
    if path is None:
        return build()
    try:
        found = load_attributes(path, session)[name] if path.is_file() else None
    except (BracesError, KeyError, OSError) as error:
        logger.debug("%s: built anew: %s", path, error)
        found = None
    if found is not None:
        _touch(path)
        return found
    attribute = build()
    try:
        save_attributes(path, [attribute])
        _forget_oldest(path.parent)
    except (BracesError, OSError) as error:
        logger.debug("%s: not kept: %s", path, error)
    return attribute


def _place(session: Session, name: str, reduction: str) -> Path | None:
    """The file of this attribute of this base; None where nothing is kept, or no files are what the base is."""
    root, checkpoint = cache_folder(), session.base.checkpoint
    if root is None or checkpoint is None or session.base.is_changed():
        return None
    lists = built_in()
    try:
        files = [
            (file.name, found.st_size, found.st_mtime_ns)
            for file in sorted(checkpoint.iterdir())
            if not file.name.startswith(".") and file.is_file() and (found := file.stat())
        ]
    except OSError:
        return None
    parameters = {(str(p.dtype), type(p.data).__name__, p.device.type) for p in session.base.model.parameters()}
    made_from: dict[str, Any] = {
        "files": [str(checkpoint.resolve()), files],
        "parameters": sorted(parameters),
        "attention": getattr(session.base.model.config, "_attn_implementation", None),
        "words": [lists[each] for each in (name, OPPOSITES.get(name, REFERENCE), REFERENCE)],
        "texts": [neutral_prompts(), neutral_texts()],
        "constants": [STEERING_SHARE, RIDGE, GAIN_STEP],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    key = value_hash(made_from)
    return root / "attributes" / f"{name}-{reduction}-{key[:32]}.safetensors"


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError as error:
        logger.debug("%s: %s", path, error)


def _forget_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files[_KEPT:]:
        file.unlink(missing_ok=True)


def find_attribute(
    session: Session, name: str, folder: Path | None, report: Report = silent, for_steering: bool = True
) -> Attribute:
    """Look an attribute up: in `folder`, in the adapter's folder, then build it from the built-in word list.

    Of a built-in list that has an opposite, p is half the difference of the two: what evaluative words share against
    neutral ones is most of a difference to these, and says nothing of good or bad.

    Args:
        for_steering: also compute the steering vector (`core.attributes.hooks`), not only p.

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
