"""Find attributes by name: in the user's folder, in the adapter's folder, then among the built-in word lists.

Attributes of built-in lists are cached in a folder of the user's, because building one takes as long as generating
dozens of texts. The key of a cached file is a hash of everything that it depends on: names, sizes and times of the
base's files, dtypes and devices, the built-in words and texts, and library versions.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes import words
from braces_cli.core.attributes.build import built_in_attribute
from braces_cli.core.attributes.directions import RIDGE, default_reduction
from braces_cli.core.attributes.files import TRAINED_FILE
from braces_cli.core.attributes.vector import STEERING_SHARE, Attribute, load_attributes, save_attributes
from braces_cli.core.errors import BracesError, ConfigError, logger, near_misses
from braces_cli.core.files import cache_folder, path_exists, value_hash, versions
from braces_cli.core.models.residual import GAIN_STEP
from braces_cli.core.progress import Report, silent

# Cached files; beyond this number the least recently used ones are removed. Three numbers per layer and channel: 25 KB
# for six layers of width 320, 1.6 MB for those of Llama-3-8B.
_MOST_CACHED = 100


def find_attribute(
    session: Session, name: str, folder: Path | None, report: Report = silent, for_steering: bool = True
) -> Attribute:
    """Return the attribute of a name.

    Args:
        folder: attribute files of the user, which have priority.
        for_steering: also compute the steering vector of a built-in list, not only p.

    Raises:
        ConfigError: an unknown name or one that cannot be a file's; the hint lists the known ones.
        ModelError: a file that is damaged or belongs to another base.
    """
    words.check_name(name)
    own = [] if name in words.OTHER_FILES else [f"{name}.safetensors"]
    paths = [] if folder is None else [folder / file for file in own]
    if session.folder is not None:
        paths += [session.folder / file for file in (*own, TRAINED_FILE)]
    for path in filter(path_exists, paths):
        attributes = load_attributes(path, session)
        if name in attributes:
            # An attribute that the adapter was trained with has no steering vector, even if its file came with one.
            trained = path.name == TRAINED_FILE
            return replace(attributes[name], direction=None) if trained else attributes[name]
    if name in words.built_in():
        if folder is not None:
            logger.warning("%s: no attribute `%s` there; its built-in word list is used", folder, name)
        return _cached(session, name, default_reduction(session) if for_steering else "mean", report)
    known = known_attributes(session, folder)
    hint = f"{near_misses(name, known)} Known: {', '.join(known)}. Build others with braces attr-build.".strip()
    raise ConfigError(f"unknown attribute `{name}`", where="--attribute", hint=hint)


def known_attributes(session: Session, folder: Path | None) -> list[str]:
    """Return every name that `find_attribute` finds."""
    trained = session.config.attributes if session.config is not None else []
    folders = [each for each in (folder, session.folder) if each is not None]
    files = {path.stem for each in folders for path in each.glob("*.safetensors")} - words.OTHER_FILES
    return sorted({*words.built_in(), *trained, *files})


def _cached(session: Session, name: str, reduction: str, report: Report) -> Attribute:
    """Return the attribute of a built-in list from the cache, or build it and add it to the cache.

    A damaged file is replaced. Without a cache folder that can be written to, nothing is cached.
    """
    path = _cache_file(session, name, reduction)
    if path is not None and path.is_file():
        try:
            attribute = load_attributes(path, session)[name]
            os.utime(path)
            return attribute
        except (BracesError, KeyError, OSError) as error:
            logger.debug("%s: built again: %s", path, error)
    attribute = built_in_attribute(session, name, report, reduction=reduction)
    if path is not None:
        try:
            save_attributes(path, [attribute])
            files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
            for file in files[_MOST_CACHED:]:
                file.unlink(missing_ok=True)
        except (BracesError, OSError) as error:
            logger.debug("%s: not cached: %s", path, error)
    return attribute


def _cache_file(session: Session, name: str, reduction: str) -> Path | None:
    """Return the cache file of an attribute; None without a cache, or if weights differ from the base's files."""
    root, checkpoint = cache_folder(), session.base.checkpoint
    if root is None or checkpoint is None or session.base.is_changed():
        return None
    lists = words.built_in()
    try:
        files = [
            (file.name, found.st_size, found.st_mtime_ns)
            for file in sorted(checkpoint.iterdir() if checkpoint.is_dir() else [checkpoint])
            if not file.name.startswith(".") and file.is_file() and (found := file.stat())
        ]
    except OSError:
        return None
    # Without those of an adapter: the attribute is built with the adapter off.
    parameters = {
        (str(parameter.dtype), type(parameter.data).__name__, parameter.device.type)
        for name, parameter in session.base.model.named_parameters()
        if ".relevance." not in name and not name.startswith("adapter_condition.")
    }
    depends_on: dict[str, Any] = {
        "files": [str(checkpoint.resolve()), files],
        "parameters": sorted(parameters),
        "attention": getattr(session.base.model.config, "_attn_implementation", None),
        "words": [lists[each] for each in (name, words.OPPOSITES.get(name, words.REFERENCE), words.REFERENCE)],
        "texts": [words.neutral_prompts(), words.neutral_texts()],
        "constants": [STEERING_SHARE, RIDGE, GAIN_STEP],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    key = value_hash(depends_on)
    return root / "attributes" / f"{name}-{reduction}-{key[:32]}.safetensors"
