"""A base model with or without its adapter, opened the way every command needs it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from braces_cli.core.method.adapter import Adapter, attach_stored
from braces_cli.core.method.adapter_files import AdapterConfig, StoredAdapter, find_adapter
from braces_cli.core.models.bundled_model import NAME as EMBEDDED
from braces_cli.core.models.bundled_model import note_default
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import Base, load_base, tokenizer_hashes
from braces_cli.core.models.moe import MixtureFFN

logger = logging.getLogger("braces")


@dataclass
class Session:
    """An open base, with an adapter on it or without.

    Attributes:
        adapter: what is attached now.
        stored: the files that it came from; None where there is no adapter or where it is being trained.
    """

    base: Base
    ffns: list[FFN | MixtureFFN]
    adapter: Adapter | None = None
    stored: StoredAdapter | None = None

    @property
    def config(self) -> AdapterConfig | None:
        """Of the stored adapter."""
        return None if self.stored is None else self.stored.config

    @property
    def folder(self) -> Path | None:
        """Of the stored adapter."""
        return None if self.stored is None else self.stored.folder

    def add_adapter(self, stored: StoredAdapter) -> Adapter:
        """Attach a stored adapter, in place of the one attached now."""
        self.remove_adapter()
        self.adapter = attach_stored(self.base.model, stored, self.base.fingerprint(self.ffns))
        self.stored = stored
        trained, here = stored.config.tokenizer, tokenizer_hashes(self.base.tokenizer)
        for part in sorted(key for key in trained if trained[key] != here.get(key)):
            logger.warning("%s: trained with another %s than the base has now", stored.name, part.replace("_", " "))
        return self.adapter

    def remove_adapter(self) -> None:
        """Detach the adapter, if there is one: the bare base again."""
        if self.adapter is not None:
            self.adapter.detach()
        self.adapter = self.stored = None


@contextmanager
def attached(session: Session, stored: StoredAdapter) -> Iterator[Adapter]:
    """A stored adapter on the session's base inside the `with` block."""
    try:
        yield session.add_adapter(stored)
    finally:
        session.remove_adapter()


def resolve_adapter(adapter: str | StoredAdapter | None) -> StoredAdapter | None:
    """What an `--adapter` names; what is resolved already stays as it is."""
    return find_adapter(adapter) if isinstance(adapter, str) else adapter


def base_name(model: str | None, adapter: StoredAdapter | None) -> str:
    """The base to load: the one named, else the adapter's own, else the embedded one, which a note on stderr says."""
    if model is not None:
        return model
    if adapter is not None:
        return adapter.config.base_model_name_or_path
    note_default()
    return EMBEDDED


def open_session(model: str | None, adapter: str | StoredAdapter | None, options: LoadOptions) -> Session:
    """Load the base, and the adapter on it where one is given.

    Raises:
        ConfigError: no such device.
        ModelError: either cannot be loaded, or they do not fit.
    """
    # Before minutes of loading: an adapter that is none should fail at once.
    stored = resolve_adapter(adapter)
    if stored is not None and model is None and options.revision is None and stored.config.revision is not None:
        options = replace(options, revision=stored.config.revision)
    base = load_base(base_name(model, stored), options)
    session = Session(base, find_ffns(base.model))
    if stored is not None:
        session.add_adapter(stored)
    return session
