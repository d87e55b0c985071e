"""What the hub and the Hugging Face libraries raise, turned into one error that says what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from braces_cli.core.utils.errors import BracesError, DataError, ModelError, first_line

# What to do where nothing more is known, by what was to be loaded.
_REMEDIES = {
    "model": "Give a causal language model.",
    "tokenizer": "Give a causal language model.",
    "classifier": "Give the folder or hub id of a sequence classifier.",
    "data set": "Give a file, or a hub set as id, id:split or id:subset:split.",
}
# Top-level modules of the libraries that load from the hub.
_LIBRARIES = ("safetensors", "safetensors_rust", "huggingface_hub", "httpx", "datasets", "pyarrow")


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be meant as `owner/name` on the hub; whether it exists there is another matter."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1 and not name.endswith("/")


def hub_faults() -> tuple[type[Exception], ...]:
    """What a call to the hub raises: no connection, a refusal, a file that cannot be read, an argument it rejects."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are OSError and the error class of the HTTP library, whichever library that is.
    return (*HfHubHTTPError.__bases__, ValueError, KeyError, RuntimeError, ImportError)


@contextmanager
def hub_errors(where: str, what: str, kind: type[BracesError] = ModelError) -> Iterator[None]:
    """Turn what the Hugging Face libraries raise inside the `with` block into one error that says what to do.

    Args:
        where: hub id or folder that is loaded there; of a data set also `id:split`.
        what: it is called in the message.
        kind: class of the error.
    """
    try:
        yield
    except BracesError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _explain(where, error, what, kind) from error
    except Exception as error:
        # Errors of these libraries that have no base class of Python's own; everything else is a fault of ours.
        if type(error).__module__.partition(".")[0] not in _LIBRARIES:
            raise
        raise _explain(where, error, what, kind) from error


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up, as tokenizers does where its file contradicts itself."""
    return type(error).__module__ == "pyo3_runtime"


def explained(where: str, load: Callable[[], Any], what: str) -> Any:
    """What `load` returns: a call into a library that reads files of somebody else's, and nothing but that.

    Raises:
        ModelError: says what is wrong and what to do.
    """
    try:
        with hub_errors(where, what):
            return load()
    except (BracesError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        # Libraries look at these files where they use them: a list for a number ends in TypeError, IndexError,
        # AttributeError or AssertionError, a pickle in UnpicklingError, and tokenizers raises plain Exception.
        raise _explain(where, error, what, ModelError) from error


def _explain(where: str, error: BaseException, what: str, kind: type[BracesError]) -> BracesError:
    from huggingface_hub import errors as hub

    repository = where.partition(":")[0]
    page = f"https://huggingface.co/{'datasets/' if kind is DataError else ''}{repository}"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    replies = [getattr(e, "response", None) for e in chain]
    status = next((reply.status_code for reply in replies if reply is not None), None)
    if any(isinstance(e, hub.GatedRepoError) for e in chain) or status == 403:
        return kind(
            f"access to this {what} is restricted",
            where=where,
            hint=f"Ask for access at {page}, then set HF_TOKEN to your token.",
        )
    if status == 401 or any(isinstance(e, hub.RepositoryNotFoundError) for e in chain):
        return kind(
            f"no such {what} on the hub, or it is private or gated",
            where=where,
            hint=f"See {page}; for a private or gated one set HF_TOKEN. For a folder, check the path.",
        )
    if any(isinstance(e, hub.RevisionNotFoundError) for e in chain):
        return kind("no such revision on the hub", where=where, hint=f"See {page}/tree/main.")
    if not os.path.isdir(where) and (os.environ.get("HF_HUB_OFFLINE") or _unreachable(chain)):
        return kind(
            f"no such folder, and the hub cannot be reached for the {what}",
            where=where,
            hint="Check the path or the network; offline, only folders and models in the local cache can be loaded.",
        )
    if "trust_remote_code" in str(error):
        # Only a base may be allowed to.
        allowed = what in ("model", "tokenizer")
        hint = "Read that code; to run it, --trust-remote-code." if allowed else f"Give a {what} without code."
        return kind(f"this {what} brings its own code", where=where, hint=hint)
    reason = first_line(error, 300)
    if isinstance(error, (TypeError, LookupError, AttributeError, AssertionError)):
        reason = f"{type(error).__name__}: {reason}"  # the message alone (`'x'`) says too little
    return kind(f"cannot load the {what}: {reason}", where=where, hint=_REMEDIES.get(what))


def _unreachable(chain: Sequence[BaseException]) -> bool:
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    return bool(
        names
        & {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TimeoutException"}
    )
