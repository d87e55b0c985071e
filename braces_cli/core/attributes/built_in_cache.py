"""Built-in attributes of bases that were used before, kept in a folder of the user's.

Pooling words and following gradients takes as long as generating dozens of texts, and gives the same for the same files
of weights. A file is found by what it was made from: the files of the base by name, size and time, its number format
and device, the words and texts that come with braces, and the versions of what computes. What cannot be read is made
anew; a folder that cannot be written to is done without, and so is the cache where weights were changed in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.attributes.attribute import Attribute, load_attributes, save_attributes
from braces_cli.core.attributes.odds import RIDGE, neutral_prompts
from braces_cli.core.attributes.push_sizes import STEERING_SHARE
from braces_cli.core.attributes.word_lists import OPPOSITES, REFERENCE, built_in, neutral_texts
from braces_cli.core.models.residual_join import GAIN_STEP
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import BracesError
from braces_cli.core.utils.paths import cache_folder
from braces_cli.core.utils.versions import versions

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
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
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
