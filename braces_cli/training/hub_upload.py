"""Adapters on their way to the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from braces_cli.core.models.hub_errors import hub_faults
from braces_cli.core.utils.errors import BracesError, ConfigError, first_line

# An adapter and its pictures; no checkpoint, no log of a reporter.
_FILES = [
    "adapter_config.json", "adapter_model.safetensors", "attributes.safetensors", "README.md", "loss.png",
    "metrics.jsonl",
]  # fmt: skip


def check_push(repo: str) -> None:
    """Find out before hours of training whether the hub would take an upload.

    Raises:
        ConfigError: not `owner/name`, offline, no token, or one that the hub does not know.
    """
    from huggingface_hub import HfApi, constants

    where = "--push-to-hub"
    if repo.count("/") > 1 or not all(repo.split("/")):
        raise ConfigError(f"`{repo}` is no repository", where=where, hint="Give it as owner/name.")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set", where=where, hint="Unset it, or upload the folder later.")
    try:
        HfApi().whoami()
    except hub_faults() as error:
        hint = "Set HF_TOKEN to a token that may write, or log in with `hf auth login`."
        raise ConfigError(f"the hub denied access: {first_line(error)}", where=where, hint=hint) from error


def push(folder: Path, repo: str) -> str:
    """Upload an adapter folder, in one commit; the repository is made if need be. Returns its address.

    Raises:
        BracesError: the hub refuses or cannot be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=_FILES, commit_message="Upload of braces"
        )
    except hub_faults() as error:
        hint = f"The adapter is safe in {os.fspath(folder)}; the same command with --resume tries the upload again."
        raise BracesError(f"cannot upload: {first_line(error)}", where=repo, hint=hint) from error
    return str(address)
