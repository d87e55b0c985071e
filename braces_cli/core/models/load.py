"""Load a base model and its tokenizer from a folder, a GGUF file or the hub, quantised on request.

    int8       torchao, 8 bits per weight and a scale per row; any device
    bnb-8bit   bitsandbytes LLM.int8()
    bnb-4bit   bitsandbytes NF4, 4 bits per weight; computes in the base's dtype

Quantisation packs all layers except embeddings and head while the base is loaded.
"""

import logging
import os
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.distributed import world_size
from braces_cli.core.errors import ConfigError, ModelError, logger
from braces_cli.core.files import path_exists, user_path, value_hash
from braces_cli.core.models import hub
from braces_cli.core.models.ffn import FFN, MixtureFFN, find_ffns
from braces_cli.core.models.gguf import GGUFFile, read_gguf
from braces_cli.core.models.identity import Sizes
from braces_cli.core.models.weights import check_finite, compute_device, is_packed
from braces_cli.core.options import LoadOptions

# transformers imports torchao, which logs every kernel that it cannot use.
for chatty in ("torchao", "torch.utils._pytree"):
    logging.getLogger(chatty).setLevel(logging.ERROR)

# Device maps of accelerate that are not names of devices.
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """A base model, ready for an adapter.

    Attributes:
        model: a causal LM in eval mode; on the meta device if only its shape is needed.
        name: hub id, absolute folder, GGUF file, or `embedded@VERSION` for the embedded model.
        revision: commit of a hub model, else None.
        checkpoint: folder with its weight files, or GGUF file; None if there is none.
        allow_other: accept adapters and attributes of another base.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    checkpoint: Path | None = None
    allow_other: bool = False

    def __post_init__(self) -> None:
        self._loaded = self._versions()

    def _versions(self) -> dict[str, int]:
        parameters = self.model.named_parameters()
        return {name: weight._version for name, weight in parameters if not weight.is_inference()}

    def is_changed(self) -> bool:
        """Return whether weights were modified after loading; writes through `.data` are not counted."""
        return any(self._loaded.get(name, version) != version for name, version in self._versions().items())

    @cached_property
    def ffns(self) -> list[FFN | MixtureFFN]:
        """FFNs of the model, in layer order."""
        return find_ffns(self.model)

    @cached_property
    def sizes(self) -> Sizes:
        """Type and sizes of the base."""
        return {
            "model_type": getattr(getattr(self.model, "config", None), "model_type", type(self.model).__name__),
            "layers": len(self.ffns),
            "hidden_size": self.ffns[0].hidden_size,
            "value_vectors": [ffn.value_vectors for ffn in self.ffns],
        }

    @property
    def samples(self) -> torch.Tensor:
        """Samples of all value matrices, (layers, 64); see `core.models.identity`."""
        return torch.stack([ffn.samples for ffn in self.ffns])

    @property
    def digest(self) -> str:
        """Hash of sizes and samples."""
        return value_hash([self.sizes, self.samples.tolist()])

    @property
    def is_quantised(self) -> bool:
        """Return whether its weights are rounded to fewer than 16 bits."""
        return hub.is_gguf(self.name) or getattr(self.model, "hf_quantizer", None) is not None

    @cached_property
    def tokenizer_hashes(self) -> dict[str, str | None]:
        """Hashes of vocabulary and chat template, computed once."""
        return tokenizer_hashes(self.tokenizer)


@cache
def _note_mps() -> None:
    logger.info("mps lacks float64 and parts of linear algebra: they are computed on the CPU")


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: the device is not available.
    """
    found = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True))
    available = [kind for kind, present in found if present]
    if name == "auto":
        name = available[0]
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"  # each process of a distributed run has one GPU
    if name.partition(":")[0] not in available:
        hint = f"Available: {', '.join(available)}."
        raise ConfigError(f"device `{name}` is not available", where="--device", hint=hint)
    if name.partition(":")[0] == "mps":
        _note_mps()
    return torch.device(name)


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a base, with a padding token."""
    from transformers import AutoTokenizer

    where = _full_name(name)
    if hub.is_gguf(where):
        return with_padding(_read_gguf(where, revision).tokenizer())
    with hub.hub_errors(where, "tokenizer", any_error=True):
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        return with_padding(tokenizer)


def with_padding(tokenizer: Any, rows: int | None = None) -> Any:
    """Return the tokenizer with a padding token, one of the first `rows` tokens if `rows` is given."""
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        # Padding is masked, so any token can be used; every model has an end token.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_base(name: str, options: LoadOptions | None = None, tokenizer: Any = None) -> Base:
    """Load a causal LM with its tokenizer, in eval mode.

    Args:
        name: folder, hub id or GGUF file.
        options: `device` is ignored if `device_map` is set.
        tokenizer: tokenizer of the base, if loaded already.

    Raises:
        ConfigError: the device or the backend of the quantisation is not available.
        ModelError: not reachable, not a causal LM, an adapter folder, or weights that do not fill the model or are not
            finite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _full_name(name)
    options = options or LoadOptions()
    device, device_map = pick_device(options.device), options.device_map
    if device_map is not None and device_map not in _DEVICE_MAPS:
        try:
            torch.device(device_map)
        except RuntimeError as error:
            hint = f"Give one of {', '.join(_DEVICE_MAPS)}, or a device such as cuda:1."
            raise ConfigError(f"`{device_map}` is not a device", where="--device-map", hint=hint) from error
    packing: dict[str, Any] = {}
    if options.quantize is not None:
        if hub.is_gguf(where):
            hint = "Leave --quantize out; the weights are unpacked."
            raise ConfigError("a GGUF file cannot be quantised again", where="--quantize", hint=hint)
        check_quantize(options.quantize, device if device_map is None else None)
        packing["quantization_config"] = _quantization_config(where, options)
        # Weights are packed on their final device, so that the unpacked base does not have to fit.
        device_map = device_map or str(device)
    if tokenizer is None:
        tokenizer = load_tokenizer(name, revision=options.revision, trust_remote_code=options.trust_remote_code)
    packing |= {"device_map": device_map, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if options.attn_implementation is not None:
        packing["attn_implementation"] = options.attn_implementation
    with hub.hub_errors(where, "model", any_error=True):
        if hub.is_gguf(where):
            file = _read_gguf(where, options.revision)
            loaded = file.load(dtype=DTYPES.get(options.dtype, file.dtype), **packing)
        else:
            revision, code = options.revision, options.trust_remote_code
            if options.attn_implementation is not None:
                # Otherwise transformers prefers the implementation of `config.json`.
                packing["config"] = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=code)
            packing["dtype"] = DTYPES.get(options.dtype, "auto")
            loaded = AutoModelForCausalLM.from_pretrained(
                where, revision=revision, trust_remote_code=code, adapter_kwargs=hub.NO_ADAPTER, **packing
            )
            if os.path.isfile(os.path.join(where, "adapter_config.json")):
                logger.warning("%s: the adapter next to the model is not loaded; give it as --adapter", where)
    model, info = loaded
    for name, stored, expected in info["mismatched_keys"]:
        message = f"the checkpoint has {name} {tuple(stored)}, and its config.json {tuple(expected)}"
        hint = "Correct config.json; after resizing embeddings save the whole model, with its config."
        raise ModelError(message, where=where, hint=hint)
    for kind in ("missing_keys", "error_msgs"):
        if keys := sorted(map(str, info.get(kind) or ())):
            message = f"the checkpoint does not fill the model: {kind.replace('_', ' ')} {', '.join(keys[:3])}"
            raise ModelError(message, where=where, hint=hub.COMPLETE)
    if getattr(model.config, "is_encoder_decoder", False):
        message = "the model is not a causal model: `is_encoder_decoder` is set in its config"
        raise ModelError(message, where=where, hint="Give a causal language model.")
    if options.quantize and not any(is_packed(part) for part in model.modules() if hasattr(part, "in_features")):
        # torchao skips layers that are not nn.Linear, without an error.
        hint = "Use bnb-8bit or bnb-4bit, which support the layers of GPT-2, or leave --quantize out."
        message = f"`{options.quantize}` packs nothing in {type(model).__name__}"
        raise ConfigError(message, where="--quantize", hint=hint)
    if device_map is None:
        model.to(device)
    model.eval()
    check_finite(dict(model.named_parameters()), where)
    _check_token_ids(model, tokenizer, where)
    checkpoint = checkpoint_path(where, options.revision)
    stored_name = hub.embedded_name() if Path(where) == hub.embedded_folder().resolve() else where
    revision = commit_of(where, options.revision, checkpoint)
    return Base(model, tokenizer, stored_name, revision, checkpoint, options.allow_other_base)


def check_quantize(name: str, device: torch.device | None) -> None:
    """Check that the backend of a quantisation is installed and runs on `device`, or on any device if None."""
    package = "bitsandbytes" if name.startswith("bnb-") else "torchao"
    if find_spec(package) is None:
        hint = f"Install it with: pip install {package}"
        raise ConfigError(f"`{name}` needs the package {package}", where="--quantize", hint=hint)
    if package == "bitsandbytes" and device is not None:
        import bitsandbytes

        # Releases without this attribute support CUDA only.
        supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        if device.type not in supported:
            message = f"this bitsandbytes runs on {', '.join(sorted(supported))}, not on {device.type}"
            hint = "Use --quantize int8 (torchao), or a GPU with CUDA."
            raise ConfigError(message, where="--quantize", hint=hint)


def _quantization_config(where: str, options: LoadOptions) -> Any:
    """`quantization_config` of `from_pretrained`, for a checkpoint that is not quantised."""
    import transformers

    with hub.hub_errors(where, "model", any_error=True):
        config: Any = transformers.AutoConfig.from_pretrained(
            where, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        message = f"the checkpoint is already quantised ({method})"
        raise ConfigError(message, where="--quantize", hint="Leave --quantize out.")
    if options.quantize == "int8":
        import torchao.quantization as torchao

        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    # bitsandbytes logs every product whose input it casts.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if options.quantize == "bnb-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    dtype = DTYPES.get(options.dtype) or config.dtype or torch.float32
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _check_token_ids(model: Any, tokenizer: Any, where: str) -> None:
    """If the tokenizer has more tokens than the model, refuse inputs with a token that the model does not have.

    Such tokens are harmless in some models: a padding token that was added without training is replaced. The check
    waits for the device; so does transformers after each generated token on CUDA.
    """
    embedding = model.get_input_embeddings()
    rows, largest = embedding.weight.shape[0], max(tokenizer.get_vocab().values(), default=0)

    def check(module: Any, args: tuple[Any, ...]) -> None:
        if args and bool((args[0] >= rows).any()):
            message = f"the tokenizer has token {int(args[0].max())}, and the model embeds {rows} tokens"
            raise ModelError(message, where=where, hint="Check that tokenizer.json belongs to this model.")

    if largest >= rows:
        with_padding(tokenizer, rows)
        embedding.register_forward_pre_hook(check)


def input_device(model: Any) -> torch.device:
    """Device of token ids: where the input embedding runs, which can differ from where an offloaded one is stored."""
    embedding = model.get_input_embeddings()
    # MusicGen has a list of embeddings, one for each codebook.
    return compute_device(embedding[0] if isinstance(embedding, torch.nn.ModuleList) else embedding)


def load_shape(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Build the model on the meta device: modules and sizes without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _full_name(name)
    with hub.hub_errors(where, "model", any_error=True):
        if hub.is_gguf(where):
            config = deepcopy(_read_gguf(where, revision).config)
        else:
            config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            # The implementation that the config names may not be installed.
            attention = {"attn_implementation": "eager"}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **attention)


def tokenizer_hashes(tokenizer: Any) -> dict[str, str | None]:
    """SHA-256 of `vocabulary` and `chat_template`; None without a template."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "vocabulary": value_hash(sorted(tokenizer.get_vocab().items())),
        "chat_template": None if template is None else value_hash(template),
    }


def _full_name(name: str) -> str:
    """Return an absolute folder or GGUF file, or a name on the hub unchanged."""
    name = hub.resolve(name)
    path = user_path(name)
    if os.path.isdir(path):  # Path.is_dir raises if the name is too long
        if path_exists(path / "config.json"):
            return str(path.resolve())
        if (path / "adapter_config.json").is_file():
            raise ModelError("this is an adapter, not a model", where=name, hint=f"Give it as --adapter {name}.")
        message = "no model here: the folder has no config.json"
        raise ModelError(message, where=name, hint="Give a model's folder or id, or a GGUF file.")
    if hub.is_gguf(name):
        if os.path.isfile(path):
            return os.path.abspath(path)  # a link stays: its target may have another name
        if hub.is_hub_id(name.partition(":")[0]) and ":" in name:
            return name
        raise ModelError("no such file", where=name, hint="Give a GGUF file, or owner/name:FILE.gguf on the hub.")
    if path_exists(path):
        is_file = os.path.isfile(path)
        message = "this is a file, and neither a folder nor GGUF" if is_file else "this folder cannot be read"
        raise ModelError(message, where=name, hint="Give the folder that holds the model.")
    if not name or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ModelError("no such model folder", where=name or "--model", hint="Give a folder or a hub id.")
    return name


def _read_gguf(where: str, revision: str | None) -> GGUFFile:
    """Read the GGUF file `where`, downloaded if it is on the hub, apart from its weights."""
    from huggingface_hub import hf_hub_download

    path, (repository, _, file) = where, where.partition(":")
    if not os.path.isfile(where):
        with hub.hub_errors(where, "model"):
            path = hf_hub_download(repository, file, revision=revision)
    return read_gguf(Path(path), os.stat(path).st_mtime_ns)


def commit_of(where: str, revision: str | None, checkpoint: Path | None) -> str | None:
    """Commit of a hub model, which the path of its checkpoint in the cache has; `revision` for other models."""
    if checkpoint is None or checkpoint == Path(hub.resolve(where)):
        return revision
    return checkpoint.as_posix().rpartition("/snapshots/")[2].partition("/")[0]


def checkpoint_path(where: str, revision: str | None) -> Path | None:
    """Folder with the weight files of a model loaded from `where`, or its GGUF file; None if there is none."""
    where = hub.resolve(where)
    if Path(where).is_dir() or (hub.is_gguf(where) and os.path.isfile(where)):
        return Path(where)
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = where.partition(":")
    found = try_to_load_from_cache(repository, file or "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    return Path(found) if file else Path(found).parent
