"""A base model with or without its adapter, opened the way every command needs it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from braces_cli.core.method.adapter import CONFIG_FILE, Adapter, AdapterConfig, load_adapter, read_config
from braces_cli.core.models.bundled_model import NAME as EMBEDDED
from braces_cli.core.models.bundled_model import note_default
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.core.models.loading import Base, load_base, tokenizer_hashes
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.core.utils.errors import ModelError

logger = logging.getLogger("braces")


@dataclass(frozen=True)
class LoadOptions:
    """How to load a base: see `core.models.loading.load_base`."""

    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    quantize: str | None = None
    trust_remote_code: bool = False


@dataclass
class Session:
    """An open base. `adapter`, `config` and `folder` are None where there is no adapter."""

    base: Base
    ffns: list[FFN | MixtureFFN]
    adapter: Adapter | None = None
    config: AdapterConfig | None = None
    folder: Path | None = None

    def add(self, name: str) -> Adapter:
        """Attach the adapter called `name` (folder or hub id), in place of the one attached now."""
        if self.adapter is not None:
            self.adapter.detach()
            self.adapter = None
        self.folder = adapter_folder(name)
        self.adapter, self.config = load_adapter(self.base.model, self.folder, self.base.fingerprint(self.ffns))
        trained, here = self.config.tokenizer, tokenizer_hashes(self.base.tokenizer)
        for part in sorted(key for key in trained if trained[key] != here.get(key)):
            logger.warning("%s: trained with another %s than the base has now", name, part.replace("_", " "))
        return self.adapter


def adapter_folder(name: str) -> Path:
    """Folder of an adapter given as a folder or a hub id.

    Raises:
        ModelError: neither.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        read_config(path)
        return path.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except Exception as error:
        raise ModelError(
            "no such adapter folder, and no such adapter could be fetched from the hub",
            where=name,
            hint=f"Check the path; an adapter folder holds {CONFIG_FILE}. A private one needs HF_TOKEN.",
        ) from error


def base_name(model: str | None, adapter: str | None) -> str:
    """The base to load: the one named, else the adapter's own, else the embedded one, which a note on stderr says."""
    if model is not None:
        return model
    if adapter is not None:
        return read_config(adapter_folder(adapter)).base_model_name_or_path
    note_default()
    return EMBEDDED


def open_session(model: str | None, adapter: str | None, options: LoadOptions) -> Session:
    """Load the base, and the adapter on it where one is given.

    Raises:
        ConfigError: no such device.
        ModelError: either cannot be loaded, or they do not fit.
    """
    if adapter is not None:
        # Before minutes of loading: an adapter that is none should fail at once.
        own = read_config(adapter_folder(adapter))
        if model is None and options.revision is None and own.revision is not None:
            options = LoadOptions(**{**vars(options), "revision": own.revision})
    base = load_base(base_name(model, adapter), **vars(options))
    session = Session(base, find_ffns(base.model))
    if adapter is not None:
        session.add(adapter)
    return session
