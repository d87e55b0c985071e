"""`--quantize`: which packing, in the words of transformers' own quantisation configs.

    int8       torchao, 8 bits a weight, a scale for each row: any device
    bnb-8bit   bitsandbytes LLM.int8()
    bnb-4bit   bitsandbytes NF4, half a byte a weight; computes in the base's dtype

The base is packed while it is loaded, all but embeddings and head. An adapter knows nothing of it.

Load a base model and its tokenizer from a folder or the hub, and say clearly why where it cannot be done.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from braces_cli.core.distributed import local_rank
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import path_exists, user_path, value_hash
from braces_cli.core.models.embedded import resolve, stored_name
from braces_cli.core.models.ffn import FFN, MixtureFFN, find_ffns
from braces_cli.core.models.hub import explained
from braces_cli.core.models.identity import fingerprint
from braces_cli.core.models.stored_fingerprint import Fingerprint
from braces_cli.core.models.weights import check_finite, compute_device, is_packed
from braces_cli.core.options import LoadOptions

logger = logging.getLogger("braces")


def check_quantize(name: str, device: torch.device | None) -> None:
    """See that the backend of `name` is installed and runs on `device` (None: wherever it is put).

    Raises:
        ConfigError: it is not.
    """
    package = "bitsandbytes" if name.startswith("bnb-") else "torchao"
    if find_spec(package) is None:
        hint = f"Install it with: pip install {package}"
        raise ConfigError(f"`{name}` needs the package {package}", where="--quantize", hint=hint)
    if package == "bitsandbytes" and device is not None:
        import bitsandbytes

        # Releases before those that name their devices know CUDA only.
        there = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        if device.type not in there:
            raise ConfigError(
                f"this bitsandbytes runs on {', '.join(sorted(there))}, not on {device.type}",
                where="--quantize",
                hint="Use --quantize int8 (torchao), or a GPU with CUDA.",
            )


def check_packed(name: str, model: nn.Module) -> None:
    """See that loading packed something.

    Raises:
        ConfigError: nothing, which torchao does not say of a model without `nn.Linear`.
    """
    if not any(is_packed(module) for module in model.modules() if hasattr(module, "in_features")):
        raise ConfigError(
            f"`{name}` packs nothing in {type(model).__name__}",
            where="--quantize",
            hint="Use bnb-8bit or bnb-4bit, which also know GPT-2's layers, or leave --quantize out.",
        )


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes as `quantization_config`.

    Args:
        name: one of `QUANTISATIONS`, checked.
        dtype: of the base.
    """
    import transformers

    if name.startswith("bnb-"):
        # It reports every single product whose input it casts.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        if name == "bnb-8bit":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    import torchao.quantization as torchao

    return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))


# What accelerate knows beside names of devices.
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """A base model, ready for an adapter.

    Attributes:
        model: a causal LM in eval mode; on the meta device if only its shape is needed.
        name: hub id, absolute folder, or `embedded@VERSION` for the embedded model.
        revision: commit of a hub model, else None.
        checkpoint: folder with its weight files, None if there is none.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self._loaded = self._versions()

    def _versions(self) -> dict[str, int]:
        parameters = self.model.named_parameters()
        return {name: weight._version for name, weight in parameters if not weight.is_inference()}

    def is_changed(self) -> bool:
        """Whether weights were modified after loading; writes through `.data` are not counted."""
        return any(self._loaded.get(name, version) != version for name, version in self._versions().items())

    @cached_property
    def ffns(self) -> list[FFN | MixtureFFN]:
        """FFNs of the model, in layer order."""
        return find_ffns(self.model)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Sizes and hash of the value matrices, computed once: see `core.models.identity`."""
        return fingerprint(self.model, self.ffns, self.checkpoint)

    @cached_property
    def tokenizer_hashes(self) -> dict[str, str | None]:
        """Hashes of vocabulary and chat template, computed once."""
        return tokenizer_hashes(self.tokenizer)


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
        raise ConfigError(
            f"device `{name}` is not available", where="--device", hint=f"Available: {', '.join(_true(there))}."
        )
    return torch.device(name)


def _true(flags: dict[str, bool]) -> list[str]:
    return [name for name, on in flags.items() if on]


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base, with a padding token; needs no weights."""
    from transformers import AutoTokenizer

    where = _folder_or_id(name)

    def load() -> Any:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        return with_padding(tokenizer)

    return explained(where, load, "tokenizer")


def with_padding(tokenizer: Any, rows: int | None = None) -> Any:
    """The tokenizer, with another padding token where it has none, or one that is not among the model's `rows`."""
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        # Padding is always masked, so any token will do, and the end token is the one that every model has.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_base(name: str, options: LoadOptions | None = None, tokenizer: Any = None) -> Base:
    """Load a causal LM with its tokenizer, in eval mode.

    Args:
        name: folder or hub id.
        options: `device` is ignored where `device_map` is given.
        tokenizer: of the base, if it was loaded before.

    Raises:
        ConfigError: no such device, or no such quantisation here.
        ModelError: not reachable, not a causal LM, an adapter folder, or weights that do not fill the model or are not
            finite.
    """
    from transformers import AutoModelForCausalLM

    where = _folder_or_id(name)
    options = options or LoadOptions()
    device_map, place = options.device_map, pick_device(options.device)
    if device_map is not None:
        _check_device_map(device_map)
    packing: dict[str, Any] = {}
    if options.quantize is not None:
        check_quantize(options.quantize, place if device_map is None else None)
        packing["quantization_config"] = _packing(where, options)
        # Each weight is packed where it will stay, so that the unpacked base never has to fit.
        device_map = device_map or str(place)
    if tokenizer is None:
        tokenizer = load_tokenizer(name, revision=options.revision, trust_remote_code=options.trust_remote_code)
    model, info = explained(
        where,
        lambda: AutoModelForCausalLM.from_pretrained(
            where,
            revision=options.revision,
            dtype=DTYPES.get(options.dtype, "auto"),
            device_map=device_map,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **packing,
        ),
        "model",
    )
    _check_filled(info, where)
    if getattr(model.config, "is_encoder_decoder", False):
        hint = "Give a causal language model."
        raise ModelError("`is_encoder_decoder` in its config says that this is no causal model", where=where, hint=hint)
    if options.quantize is not None:
        check_packed(options.quantize, model)
    if device_map is None:
        model.to(place)
    model.eval()
    check_finite(dict(model.named_parameters()), where)
    _watch_tokens(model, tokenizer, where)
    folder = checkpoint_folder(where, options.revision)
    return Base(model, tokenizer, stored_name(where), commit_of(where, options.revision, folder), folder)


def _check_filled(info: dict[str, Any], where: str) -> None:
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(map(str, info.get(kind) or ()))
        if keys:
            raise ModelError(
                f"the checkpoint does not fill the model: {kind.replace('_', ' ')} {', '.join(keys[:3])}",
                where=where,
                hint="Check that this is a causal language model and that its download is complete.",
            )


def _check_device_map(name: str) -> None:
    if name not in _SPREADS:
        try:
            torch.device(name)
        except RuntimeError as error:
            hint = f"Give one of {', '.join(_SPREADS)}, or a device such as cuda:1."
            raise ConfigError(f"`{name}` is no device", where="--device-map", hint=hint) from error


def _watch_tokens(model: Any, tokenizer: Any, where: str) -> None:
    """Where the tokenizer has tokens that the model has not, see that none of them is used.

    Some bases come with such tokens, and do no harm by them: the token for padding of a model that was trained
    without, in whose place another is taken. Looking at the tokens waits for the device, as transformers does anyway
    after each token that it generates on CUDA.
    """
    embedding = model.get_input_embeddings()
    rows, largest = embedding.weight.shape[0], max(tokenizer.get_vocab().values(), default=0)

    def check(module: Any, args: tuple[Any, ...]) -> None:
        if args and bool((args[0] >= rows).any()):
            token = int(args[0].max())
            raise ModelError(
                f"the tokenizer has token {token}, and the model embeds {rows} tokens",
                where=where,
                hint="Is this tokenizer.json the model's own?",
            )

    if largest >= rows:
        with_padding(tokenizer, rows)
        embedding.register_forward_pre_hook(check)


def _packing(where: str, options: LoadOptions) -> Any:
    config = load_config(where, revision=options.revision, trust_remote_code=options.trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        raise ConfigError(
            f"the checkpoint is already quantised ({method})", where="--quantize", hint="Leave --quantize out."
        )
    return quantization_config(str(options.quantize), DTYPES.get(options.dtype) or config.dtype or torch.float32)


def input_device(model: Any) -> torch.device:
    """Where token ids go: where the input embedding runs, which for an offloaded one is not where it lies."""
    return compute_device(model.get_input_embeddings())


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a base, without the code of its model."""
    from transformers import AutoConfig

    where = _folder_or_id(name)
    return explained(
        where,
        lambda: AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code),
        "model",
    )


def load_shape(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model on the meta device: every module and size, no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _folder_or_id(name)

    def build() -> Any:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return explained(where, build, "model")


def tokenizer_hashes(tokenizer: Any) -> dict[str, str | None]:
    """`{vocabulary, chat_template}`: hashes that tell another tokenizer or template."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "vocabulary": value_hash(sorted(tokenizer.get_vocab().items())),
        "chat_template": None if template is None else value_hash(template),
    }


def _folder_or_id(name: str) -> str:
    """An absolute folder, or the hub id as it is."""
    name = resolve(name)
    path = user_path(name)
    if os.path.isdir(path):  # pathlib's would raise where the name is too long
        if path_exists(path / "config.json"):
            return str(path.resolve())
        if (path / "adapter_config.json").is_file():
            raise ModelError("this is an adapter, not a model", where=name, hint=f"Give it as --adapter {name}.")
        raise ModelError(
            "no model here: the folder has no config.json", where=name, hint="Give a model's folder or id."
        )
    if path_exists(path):
        what = "this is a file, and a model is a folder" if os.path.isfile(path) else "this folder cannot be read"
        raise ModelError(what, where=name, hint="Give the folder that holds the model.")
    if not name or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ModelError("no such model folder", where=name or "--model", hint="Give a folder or a hub id.")
    return name


def commit_of(where: str, revision: str | None, folder: Path | None) -> str | None:
    """The commit that a model of the hub came from, which names its folder in the cache; else `revision` as given."""
    on_hub = folder is not None and folder != Path(resolve(where))
    return folder.name if on_hub and folder is not None else revision


def checkpoint_folder(where: str, revision: str | None) -> Path | None:
    """Folder with the weight files of a model that was loaded from `where`, None where there is none."""
    where = resolve(where)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
