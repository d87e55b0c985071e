"""GGUF files as models: transformers reads config, tokenizer and weights, and unpacks the weights.

What it leaves out is restored here: settings of the positions (RoPE), end-of-turn tokens, splitting of numbers. The
folder that transformers gets is empty, so that no file next to the GGUF file takes part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.errors import ModelError, first_line
from braces_cli.core.files import scratch_folder
from braces_cli.core.models.hub import ORIGINAL, hub_errors

# Tokenizers (`tokenizer.ggml.pre`) that split numbers into digits, which transformers does not know.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_ENDS = ("eos", "eot", "eom")  # of the text, of the turn, of the message
# Llama 3.1 and later; the file has the factors that follow from these numbers and from the largest factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GGUFFile:
    """What is read of a file apart from its weights.

    Attributes:
        fields: metadata; of an array its length.
        dtype: of the weights if they are not quantised, else bfloat16.
        factors: tensors with factors of the wavelengths of the positions, by name.
        reader: the open file.
    """

    path: Path
    fields: dict[str, Any]
    dtype: torch.dtype
    factors: dict[str, torch.Tensor]
    reader: Any

    @contextmanager
    def _for_transformers(self) -> Iterator[str]:
        """An empty folder, and the open file for transformers, which would read the metadata again for seconds."""
        import gguf

        library: Any = gguf
        own = library.GGUFReader
        library.GGUFReader = lambda *args: self.reader
        try:
            with scratch_folder() as empty:
                yield str(empty)
        finally:
            library.GGUFReader = own

    @cached_property
    def config(self) -> Any:
        """Config of the model, with everything that transformers leaves out; reading it takes seconds."""
        from transformers import AutoConfig

        with self._for_transformers() as empty, hub_errors(str(self.path), "GGUF file", any_error=True):
            config: Any = AutoConfig.from_pretrained(empty, gguf_file=str(self.path), trust_remote_code=False)
        config.name_or_path = str(self.path)
        rope = getattr(config, "rope_parameters", None) or {}
        self._restore_positions(config, rope.get("full_attention", rope))  # Gemma 3 has one for each kind of layer
        named = config.eos_token_id
        ends = [*named] if isinstance(named, list) else [] if named is None else [named]
        ends += [self.fields[key] for end in _ENDS if (key := f"tokenizer.ggml.{end}_token_id") in self.fields]
        if len(ends := list(dict.fromkeys(ends))) > 1:
            config.eos_token_id = ends
        return config

    def _restore_positions(self, config: Any, rope: dict[str, Any]) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        prefix = f"{self.fields['general.architecture']}.rope"
        kind = self.fields.get(f"{prefix}.scaling.type", "none")
        known = kind in ("none", "linear", "yarn") and self.factors.keys() <= {"rope_freqs.weight"}
        if theta := self.fields.get(f"{prefix}.freq_base"):
            rope["rope_theta"] = theta
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": self.fields[f"{prefix}.scaling.factor"]}
        if length := self.fields.get(f"{prefix}.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = length
        if known and self.factors:
            (factors,) = self.factors.values()
            rope |= _LLAMA3 | {"rope_type": "llama3", "factor": float(factors.max())}
            inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            plain = rope["rope_theta"] ** -(torch.arange(len(factors)) / len(factors))
            known = len(inverse) == len(factors) and torch.allclose(plain / inverse, factors, rtol=1e-2)
        if not known:
            what = "transformers cannot take the scaling of positions (RoPE) of this file"
            raise ModelError(what, where=str(self.path), hint=ORIGINAL)

    def tokenizer(self) -> Any:
        """Tokenizer with its chat template."""
        from tokenizers import pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        with self._for_transformers() as empty, hub_errors(str(self.path), "GGUF file", any_error=True):
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
                empty, gguf_file=str(self.path), trust_remote_code=False
            )
        tokenizer.name_or_path = str(self.path)
        if self.fields.get("tokenizer.ggml.pre") in _DIGITS:
            backend = tokenizer.backend_tokenizer
            parts = [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
            backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        return tokenizer

    def load(self, **options: Any) -> Any:
        """Model with its weights unpacked, and the loading info, as `from_pretrained` returns them."""
        from transformers import AutoModelForCausalLM, GgufConfig

        unpacked = {"gguf_file": str(self.path), "quantization_config": GgufConfig(dequantize=True)}
        with self._for_transformers() as empty:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                empty, config=self.config, trust_remote_code=False, **unpacked, **options
            )
        model, info = loaded
        model.config.name_or_path = model.name_or_path = str(self.path)
        return model, info


@lru_cache(maxsize=1)
def read_gguf(path: Path, changed: int) -> GGUFFile:
    """Read a file apart from its weights; the last one is kept.

    Args:
        changed: time of the last change of the file.

    Raises:
        ModelError: damaged, without a tokenizer, or one file of a split model.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

    where = str(path)
    try:
        reader = GGUFReader(path)
        fields = {
            name: len(field.data) if field.types[0] == GGUFValueType.ARRAY else field.contents()
            for name, field in reader.fields.items()
        }
        kinds = {tensor.tensor_type for tensor in reader.tensors}
        tensors = [tensor for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))]
        factors = {tensor.name: torch.tensor(tensor.data.tolist()) for tensor in tensors}
        _ = fields["general.architecture"]
    except Exception as error:  # gguf checks little: a short file ends in IndexError or ValueError
        what = f"this is not a complete GGUF file: {first_line(error)}"
        raise ModelError(what, where=where, hint="Check that the download is complete.") from error
    if fields.get("split.count", 1) > 1:
        hint = "Join the parts: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        raise ModelError(f"this is one of {fields['split.count']} files of a split model", where=where, hint=hint)
    if not fields.get("tokenizer.ggml.tokens"):
        raise ModelError("the file has no tokenizer", where=where, hint=ORIGINAL)
    plain = {
        GGMLQuantizationType.BF16: torch.bfloat16,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.F32: torch.float32,
    }
    # Norms are float32 in every file.
    dtype = (
        torch.bfloat16
        if kinds - plain.keys()
        else next((plain[kind] for kind in plain if kind in kinds), torch.bfloat16)
    )
    return GGUFFile(path, fields, dtype, factors, reader)
