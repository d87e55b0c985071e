"""What the hub and the Hugging Face libraries raise, turned into one error that says what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.utils.errors import BracesError, ModelError

# What to do where nothing more is known, by what was to be loaded.
_REMEDIES = {"model": "Give a causal language model.", "tokenizer": "Give a causal language model."}


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be meant as `owner/name` on the hub; whether it exists there is another matter."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1 and not name.endswith("/")


def hub_faults() -> tuple[type[Exception], ...]:
    """What a call to the hub raises: no connection, a refusal, a file that cannot be read, an argument it rejects."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are OSError and the error class of the HTTP library, whichever library that is.
    return (*HfHubHTTPError.__bases__, ValueError, KeyError, RuntimeError, ImportError)


def explained(where: str, load: Callable[[], Any], what: str) -> Any:
    """Run `load`; turn what the Hugging Face libraries raise into one error that says what to do."""
    try:
        return load()
    except BracesError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _explain(where, error, what) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in (
            "safetensors",
            "safetensors_rust",
            "huggingface_hub",
            "httpx",
        ):
            raise
        raise _explain(where, error, what) from error


def _explain(where: str, error: BaseException, what: str) -> ModelError:
    from huggingface_hub import errors as hub

    page = f"https://huggingface.co/{where}"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    replies = [getattr(e, "response", None) for e in chain]
    status = next((reply.status_code for reply in replies if reply is not None), None)
    if any(isinstance(e, hub.GatedRepoError) for e in chain) or status == 403:
        return ModelError(
            f"this {what} is gated", where=where, hint=f"Ask for access at {page}, then set HF_TOKEN to your token."
        )
    if status == 401 or any(isinstance(e, hub.RepositoryNotFoundError) for e in chain):
        return ModelError(
            f"no such {what} on the hub, or it is private or gated",
            where=where,
            hint=f"See {page}; for a private or gated one set HF_TOKEN. For a folder, check the path.",
        )
    if any(isinstance(e, hub.RevisionNotFoundError) for e in chain):
        return ModelError("no such revision on the hub", where=where, hint=f"See {page}/tree/main.")
    if not Path(where).is_dir() and (os.environ.get("HF_HUB_OFFLINE") or _unreachable(chain)):
        return ModelError(
            f"no such folder, and the hub cannot be reached for the {what}",
            where=where,
            hint="Check the path or the network; offline, only folders and models in the local cache can be loaded.",
        )
    if "conversion of the weights" in str(error):
        return ModelError(
            "the weights cannot be converted while loading",
            where=where,
            hint="--quantize int4 takes widths that divide by 32 only; int8, bnb-8bit and bnb-4bit take any.",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"this {what} brings its own code", where=where, hint="Read that code; to run it, --trust-remote-code."
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelError(f"cannot load the {what}: {first[:300]}", where=where, hint=_REMEDIES.get(what))


def _unreachable(chain: Sequence[BaseException]) -> bool:
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    return bool(
        names
        & {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TimeoutException"}
    )
