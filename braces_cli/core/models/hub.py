"""Names of models, and the Hugging Face hub: its errors, uploads, headers of model cards.

A name is a folder, a hub id, a GGUF file (`FILE.gguf`, on the hub `owner/name:FILE.gguf`) or `embedded`.

`embedded` is the model that comes with braces, the default of every command. Files store `embedded@VERSION`, because an
adapter belongs to one version of it, and its folder differs between machines.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from braces_cli.core.errors import BracesError, ConfigError, DataError, ModelError, first_line, logger
from braces_cli.core.schema import Kind, read

EMBEDDED = "embedded"
ABOUT_FILE = "embedded.json"
_ABOUT = Kind(dict[str, Any], ModelError, "Install braces-cli again.")

# Files of an adapter folder that are uploaded: no checkpoints, no logs of reporters.
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "attributes.safetensors", "README.md", "loss.png",
    "metrics.jsonl",
)  # fmt: skip
# Argument of transformers' `from_pretrained`, which would add the PEFT adapter that it finds next to a model: look for
# it in a folder that does not exist.
NO_ADAPTER = {"subfolder": "no-adapter"}
# Hint for a GGUF file that cannot be read.
ORIGINAL = "Give the checkpoint that the file was made from."
COMPLETE = "Check that this is a causal language model and that its download is complete."
# Hint of a load that failed for another reason than those in `_explain`, by what was loaded.
_HINTS = {
    "model": COMPLETE,
    "tokenizer": COMPLETE,
    "GGUF file": ORIGINAL,
    "classifier": "Give the folder or hub id of a sequence classifier.",
    "data set": "Give a file, or a hub set as id, id:split or id:subset:split.",
}
# Top-level modules of the libraries that load from the hub.
_LIBRARIES = ("safetensors", "safetensors_rust", "huggingface_hub", "httpx", "datasets", "pyarrow")
# Classes of errors of an unreachable hub, by name: the HTTP library is not a dependency of ours.
_UNREACHABLE = frozenset(
    {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TimeoutException"}
)


def embedded_folder() -> Path:
    """Folder of the embedded model."""
    return Path(str(resources.files("braces_cli.assets") / EMBEDDED))


@cache
def embedded_name() -> str:
    """`embedded@VERSION` of the installed version."""
    about = read(_ABOUT, embedded_folder() / ABOUT_FILE)
    return f"{EMBEDDED}@{about['version']}"


def resolve(name: str) -> str:
    """Return the folder of the embedded model for its names, and any other name unchanged.

    Raises:
        ModelError: a version of the embedded model that is not installed.
    """
    if name.startswith(f"{EMBEDDED}@") and name != embedded_name():
        hint = "Install the version of braces-cli that wrote the adapter, or train again."
        raise ModelError(f"the installed braces has {embedded_name()}", where=name, hint=hint)
    return str(embedded_folder()) if name.partition("@")[0] == EMBEDDED else name


@cache
def note_default() -> None:
    """Log once per process that the embedded model is used because no model was named."""
    logger.info("using the model that comes with braces (%s); name another with --model FOLDER_OR_ID", embedded_name())


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form `owner/name`."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1 and not name.endswith("/")


def is_gguf(name: str) -> bool:
    """Return whether `name` is that of a GGUF file."""
    return name.lower().endswith(".gguf")


@contextmanager
def hub_errors(
    where: str, what: str, kind: type[BracesError] = ModelError, *, any_error: bool = False
) -> Iterator[None]:
    """Turn errors of the Hugging Face libraries inside the `with` block into one error with a hint.

    Args:
        where: hub id, folder, or `id:split` of a data set.
        what: name of the loaded object in the message.
        kind: class of the error.
        any_error: the block only calls a library that reads files of users, so that every error is about a file. The
            libraries check files late: a list in the place of a number ends in TypeError, IndexError, AttributeError or
            AssertionError, a pickle in UnpicklingError, and tokenizers raises plain Exception, or panics.
    """
    try:
        yield
    except (BracesError, MemoryError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _explain(where, error, what, kind) from error
    except BaseException as error:
        # Some errors of these libraries have no common base class; other classes are bugs of braces.
        is_library_error = type(error).__module__.partition(".")[0] in _LIBRARIES
        if is_library_error or (any_error and (isinstance(error, Exception) or is_rust_panic(error))):
            raise _explain(where, error, what, kind) from error
        raise


def is_rust_panic(error: BaseException) -> bool:
    """Return whether a library written in Rust panicked, as tokenizers does if its file contradicts itself."""
    return type(error).__module__ == "pyo3_runtime"


def _explain(where: str, error: BaseException, what: str, kind: type[BracesError]) -> BracesError:
    from huggingface_hub import errors as hub

    page = f"https://huggingface.co/{'datasets/' if kind is DataError else ''}{where.partition(':')[0]}"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    replies = [getattr(e, "response", None) for e in chain]
    status = next((reply.status_code for reply in replies if reply is not None), None)
    offline = os.environ.get("HF_HUB_OFFLINE") or any(
        t.__name__ in _UNREACHABLE for e in chain for t in type(e).__mro__
    )
    if any(isinstance(e, hub.GatedRepoError) for e in chain) or status == 403:
        message = f"access to this {what} is restricted"
        hint = f"Ask for access at {page}, then set HF_TOKEN to your token."
    elif status == 401 or any(isinstance(e, hub.RepositoryNotFoundError) for e in chain):
        message = f"no such {what} on the hub, or it is private or gated"
        hint = f"See {page}; for a private or gated one set HF_TOKEN. For a folder, check the path."
    elif any(isinstance(e, hub.RevisionNotFoundError) for e in chain):
        message, hint = "no such revision on the hub", f"See {page}/tree/main."
    elif not os.path.exists(where) and offline:
        message = f"no such folder, and the hub cannot be reached for the {what}"
        hint = "Check the path or the network; offline, only folders and models in the local cache can be loaded."
    elif "trust_remote_code" in str(error):
        message = f"this {what} needs code from its repository"
        # Only bases may run code from the hub.
        allowed = what in ("model", "tokenizer")
        hint = "Read that code, then add --trust-remote-code." if allowed else f"Give a {what} without code."
    else:
        reason = first_line(error, 300)
        if isinstance(error, (TypeError, LookupError, AttributeError, AssertionError)):
            reason = f"{type(error).__name__}: {reason}"  # the message alone (`'x'`) is too short
        message, hint = f"cannot load the {what}: {reason}", _HINTS.get(what, "")
        if type(error).__name__ == "SafetensorError":
            hint = "The file of the weights is damaged; download or save it again."
        elif what == "model" and "attention" in str(error).lower():
            hint = "Choose another one: --attn-implementation sdpa, or eager."
    return kind(message, where=where, hint=hint or None)


def _client_errors() -> tuple[type[Exception], ...]:
    """Errors of calls to the hub: network, HTTP status, unreadable file, invalid argument."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases of HfHubHTTPError are OSError and the error class of the installed HTTP library.
    return (*HfHubHTTPError.__bases__, ValueError, KeyError, RuntimeError, ImportError)


def check_push(repo: str) -> None:
    """Check before a long run that the hub will accept an upload.

    Raises:
        ConfigError: not `owner/name`, offline, or no valid token.
    """
    from huggingface_hub import HfApi, constants

    where = "--push-to-hub"
    if repo.count("/") > 1 or not all(repo.split("/")):
        raise ConfigError(f"`{repo}` is not a repository", where=where, hint="Give it as owner/name.")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set", where=where, hint="Unset it, or upload the folder later.")
    try:
        HfApi().whoami()
    except _client_errors() as error:
        hint = "Set HF_TOKEN to a token with write access, or log in with `hf auth login`."
        raise ConfigError(f"the hub denied access: {first_line(error)}", where=where, hint=hint) from error


def push(folder: Path, repo: str, files: Sequence[str] | None = None, retry: str = "") -> str:
    """Upload a folder in one commit, to a new repository if there is none, and return its address.

    Args:
        files: patterns of the files to upload; None uploads all.
        retry: how to upload again, for the hint of a failed upload.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload of braces"
        )
    except _client_errors() as error:
        retry = retry or f"upload them with `hf upload {repo} {folder}`"
        hint = f"The files are safe in {os.fspath(folder)}; {retry}."
        raise BracesError(f"cannot upload: {first_line(error)}", where=repo, hint=hint) from error
    return str(address)


def is_linked(base: str) -> bool:
    """Return whether the name of a base is a hub id, not a local folder or the embedded model."""
    local = base.startswith(("/", ".", "~")) or ":" in base or Path(base).is_dir()
    return not local and base.partition("@")[0] != EMBEDDED


def known_license(base: str) -> str | None:
    """Licence in the model card of a local base; None if unknown."""
    import yaml
    from huggingface_hub import metadata_load

    card = Path(resolve(base)) / "README.md"
    if not card.is_file():
        return None
    try:
        found = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        # A broken card of the base must not stop the saving of a trained adapter.
        return None
    return found if isinstance(found, str) else None
