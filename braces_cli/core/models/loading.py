"""Load a base model and its tokenizer from a folder or the hub, and say clearly why where it cannot be done."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.models.bundled_model import resolve, stored_name
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.core.models.fingerprint import fingerprint
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.core.models.quantization import check_packed, check_quantize, quantization_config
from braces_cli.core.utils.distributed import local_rank
from braces_cli.core.utils.errors import BracesError, ConfigError, ModelError

logger = logging.getLogger("braces")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """A base model, ready to carry an adapter.

    Attributes:
        model: a causal LM in eval mode; on the meta device where only its shape was asked for.
        name: as the user gave it, a folder made absolute; `embedded@VERSION` for the embedded model.
        revision: commit of a hub model, else None.
        checkpoint: folder with its weight files, None where there is none.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    checkpoint: Path | None

    def fingerprint(self, ffns: Sequence[FFN | MixtureFFN] | None = None) -> dict[str, Any]:
        return fingerprint(self.model, find_ffns(self.model) if ffns is None else ffns, self.checkpoint)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, ok in there.items() if ok)
    if name == "cuda" and local_rank() is not None:
        name = f"cuda:{local_rank()}"  # each of several processes has its own
    kind = name.partition(":")[0]
    if not there.get(kind):
        raise ConfigError(f"no device `{name}` here", where="--device", hint=f"There is: {', '.join(_true(there))}.")
    return torch.device(name)


def _true(flags: dict[str, bool]) -> list[str]:
    return [name for name, on in flags.items() if on]


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base, with a padding token; needs no weights."""
    from transformers import AutoTokenizer

    where = _folder_or_id(name)
    tokenizer = _reach(
        where,
        lambda: AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code),
        "tokenizer",
    )
    if tokenizer.pad_token_id is None:
        # Padding is always masked, so any token will do, and the end token is the one that every model has.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_base(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a causal LM with its tokenizer, in eval mode.

    Args:
        name: folder or hub id.
        device: `auto`, `cpu`, `cuda`, `mps`; ignored where `device_map` is given.
        dtype: `auto` is that of the checkpoint.
        device_map: as accelerate takes it, for a base larger than one device.
        quantize: one of `core.models.quantization.METHODS`.

    Raises:
        ConfigError: no such device, or no such quantisation here.
        ModelError: not reachable, not a causal LM, an adapter folder, or weights that do not fill the model.
    """
    from transformers import AutoModelForCausalLM

    where = _folder_or_id(name)
    place = pick_device(device)
    packing: dict[str, Any] = {}
    if quantize is not None:
        check_quantize(quantize, place if device_map is None else None)
        packing["quantization_config"] = _packing(where, quantize, dtype, revision, trust_remote_code)
        # Each weight is packed where it will stay, so that the unpacked base never has to fit.
        device_map = device_map or str(place)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    model, info = _reach(
        where,
        lambda: AutoModelForCausalLM.from_pretrained(
            where,
            revision=revision,
            dtype=DTYPES.get(dtype, "auto"),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **packing,
        ),
        "model",
    )
    _check_filled(info, where)
    if quantize is not None:
        check_packed(quantize, model)
    if device_map is None:
        model.to(place)
    model.eval()
    commit = getattr(model.config, "_commit_hash", None)
    return Base(model, tokenizer, stored_name(where), commit or revision, checkpoint_folder(where, commit or revision))


def _check_filled(info: dict[str, Any], where: str) -> None:
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            raise ModelError(
                f"the checkpoint does not fill the model: {kind.replace('_', ' ')} {', '.join(keys[:3])}",
                where=where,
                hint="Is this a causal language model, and was it downloaded whole?",
            )


def _packing(where: str, quantize: str, dtype: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    config = _reach(
        where,
        lambda: AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code),
        "model",
    )
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        raise ConfigError(
            f"the checkpoint is quantised already ({method})", where="--quantize", hint="Leave --quantize out."
        )
    return quantization_config(quantize, DTYPES.get(dtype) or config.dtype or torch.float32)


def input_device(model: Any) -> torch.device:
    """Where token ids go: where the input embedding runs, which for an offloaded one is not where it lies."""
    embedding = model.get_input_embeddings()
    hook: Any = getattr(embedding, "_hf_hook", None)
    return torch.device(hook.execution_device) if getattr(hook, "offload", False) else embedding.weight.device


def load_shape(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model on the meta device: every module and size, no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _folder_or_id(name)

    def build() -> Any:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return _reach(where, build, "model")


def tokenizer_hashes(tokenizer: Any) -> dict[str, str | None]:
    """`{vocabulary, chat_template}`: hashes that tell another tokenizer or template."""
    template = getattr(tokenizer, "chat_template", None)
    return {"vocabulary": _hash(sorted(tokenizer.get_vocab().items())), "chat_template": _hash(template)}


def _hash(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _folder_or_id(name: str) -> str:
    """An absolute folder, or the hub id as it is."""
    name = resolve(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path.resolve())
        if (path / "adapter_config.json").is_file():
            raise ModelError("this is an adapter, not a model", where=name, hint=f"Give it as --adapter {name}.")
        raise ModelError(
            "no model here: the folder has no config.json", where=name, hint="Give a model's folder or id."
        )
    if path.exists():
        raise ModelError("a model is a folder, this is a file", where=name, hint="Give the folder that holds it.")
    if not name or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ModelError("no such model folder", where=name or "--model", hint="Give a folder or a hub id.")
    return name


def checkpoint_folder(where: str, revision: str | None) -> Path | None:
    """Folder with the weight files of a model that was loaded from `where`, None where there is none."""
    where = resolve(where)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _reach(where: str, load: Callable[[], Any], what: str) -> Any:
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
            "this model is gated", where=where, hint=f"Ask for access at {page}, then set HF_TOKEN to your token."
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
            "this model brings its own code", where=where, hint="Read that code; to run it, --trust-remote-code."
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelError(f"cannot load the {what}: {first[:300]}", where=where, hint="Give a causal language model.")


def _unreachable(chain: Sequence[BaseException]) -> bool:
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    return bool(
        names
        & {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TimeoutException"}
    )
