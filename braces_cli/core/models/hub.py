"""What the hub and the Hugging Face libraries raise, turned into one error that says what to do.

Upload what a command has written to the hub.

The YAML header of a model card, with the fields that the hub reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braces_cli.core.errors import BracesError, ConfigError, DataError, ModelError, first_line
from braces_cli.core.models.embedded import NAME, resolve

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


# What an upload takes of a folder; no checkpoint, no log of a reporter.
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "attributes.safetensors", "README.md", "loss.png",
    "metrics.jsonl",
)  # fmt: skip


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


def push(folder: Path, repo: str, files: Sequence[str] | None = None, again: str = "") -> str:
    """Upload a folder, in one commit; the repository is made if need be. Returns its address.

    Args:
        files: patterns of the files to upload; None is all.
        again: how to upload once more, for the hint where the upload fails.

    Raises:
        BracesError: the hub refuses or cannot be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    patterns = None if files is None else list(files)
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=patterns, commit_message="Upload of braces"
        )
    except hub_faults() as error:
        again = again or f"upload them with `hf upload {repo} {folder}`"
        hint = f"The files are safe in {os.fspath(folder)}; {again}."
        raise BracesError(f"cannot upload: {first_line(error)}", where=repo, hint=hint) from error
    return str(address)


def card_header(
    base: str,
    *,
    name: str,
    library: str,
    relation: str,
    tags: Sequence[str],
    metrics: Mapping[str, float] | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The header between its two lines of dashes, without a line break at the end.

    Args:
        base: name of the base, as an adapter's config records it. Only a hub id is linked.
        name: of the model in `model-index`.
        relation: of the model to its base: `adapter` or `finetune`.
        metrics: results by the hub's name of the metric, such as `perplexity`.
        datasets: rows that the metrics were measured on, as files or hub ids.
    """
    from huggingface_hub import EvalResult, ModelCardData

    on_hub = is_linked(base)
    rows = ", ".join(Path(dataset).name for dataset in datasets) or "evaluation rows"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=rows,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in (metrics or {}).items()
    ]
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation=relation if on_hub else None,
        library_name=library,
        license=known_license(base),
        pipeline_tag="text-generation",
        tags=list(tags),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---"


def is_linked(base: str) -> bool:
    """Whether a base is one that the hub could link to, rather than a folder of somebody's disk."""
    return not (_is_embedded(base) or base.startswith(("/", ".", "~")) or ":" in base or Path(base).is_dir())


def _is_embedded(base: str) -> bool:
    return base.partition("@")[0] == NAME


def known_license(base: str) -> str | None:
    """The licence in the model card of a base that lies on this disk; None where it is not known."""
    import yaml
    from huggingface_hub import metadata_load

    card = Path(resolve(base)) / "README.md"
    if not card.is_file():
        return None
    try:
        header: dict[str, Any] = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        # The card is somebody else's, and a broken one is no reason to lose a trained adapter.
        return None
    found = header.get("license")
    return found if isinstance(found, str) else None
