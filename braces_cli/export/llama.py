"""Convert a model that is equivalent to a Llama into a Llama, whose FFN can have the biases that a merge needs.

The model itself decides, not a list of types: its config has nothing that a Llama lacks (windows, partial rotation,
other kinds of rotation), its tensors are a Llama's after splitting fused projections, and a small model with its class
and settings has the logits of a Llama with the same weights.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from braces_cli.core.errors import first_line
from braces_cli.core.models.structure import REFUSALS, tensor_shapes

# Tensor of the Llama -> (tensor of the base, first row, end row); None: all rows.
Sources = dict[str, tuple[str, int | None, int | None]]

_NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters",
)  # fmt: skip
_OPTIONAL = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "tie_word_embeddings", "use_cache")
_ROTATIONS = ("default", "linear", "llama3", "yarn", "dynamic")
# Settings that make a model small without changing what it computes.
_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_HEAD = 8
_LENGTH = 48
# Relative difference of logits that is still rounding.
_TOLERANCE = 1e-5


def as_llama(
    model: Any, activation: Callable[[Tensor], Tensor], activation_name: str, width: int
) -> tuple[Any, Sources] | str:
    """Convert the config of a gated model; return the reason if the model is not equivalent to a Llama.

    Args:
        width: d_ff.

    Returns:
        Config of the Llama with the same weights, and where each of its tensors comes from.
    """
    reason = _config_difference(model, activation, activation_name) or _model_difference(model)
    if reason:
        return reason
    shapes = tensor_shapes(model)
    config = _llama_config(model, width, shapes)
    return config, _llama_sources(config, shapes)


def _config_difference(model: Any, activation: Callable[[Tensor], Tensor], activation_name: str) -> str | None:
    """Difference of the config from any Llama's, which small models on a short text may not show."""
    config = model.config
    if config.get_text_config() is not config:
        return "it takes more than text"
    for name in _NEEDED:
        if getattr(config, name, None) is None:
            return f"its config has no {name}"
    if activation(torch.tensor([0.5])) != functional.silu(torch.tensor([0.5])):
        return f"its activation is {activation_name}, a Llama's SiLU"
    for name, value in vars(config).items():
        if value and ("window" in name or "chunk" in name) and name != "max_window_layers":
            return f"{name} is {value}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"its layers are of the kind {', '.join(sorted(kinds))}"
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers > 1 and len(set(map(str, value))) > 1:
            return f"its layers differ by {name}"
    rope = config.rope_parameters
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind not in _ROTATIONS:
        return f"the rotation of its positions is {kind}"
    shares = (rope.get("partial_rotary_factor"), getattr(config, "partial_rotary_factor", None))
    rotated = min(float(share or 1) for share in shares)
    return f"only {rotated:g} of each head is rotated" if rotated < 1 else None


def _model_difference(model: Any) -> str | None:
    """Difference of a small model with the same class and settings from a Llama with its weights, or None."""
    from transformers import LlamaForCausalLM

    settings = {name: value for name, value in model.config.to_dict().items() if name not in _SMALL}
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == model.config.num_hidden_layers:
            settings[name] = value[:2]
    if settings.get("head_dim") is not None:
        settings["head_dim"] = _HEAD
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0) | {"dtype": "float32"}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            small = type(model)(type(model.config)(**{**settings, **_SMALL, **special})).float().eval()
        except REFUSALS as error:
            return f"no small model of its class can be built: {first_line(error, 100)}"
        # Weights so large, norms and biases so uneven that a difference shows.
        for parameter in small.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.15)
    tensors, shapes = small.state_dict(), tensor_shapes(small)
    config = _llama_config(small, _SMALL["intermediate_size"], shapes)
    llama: Any = LlamaForCausalLM(config).float().eval()
    sources, expected = _llama_sources(config, shapes), tensor_shapes(llama)
    other = sorted(sources.keys() - expected.keys())
    if other:
        return f"a Llama has no {other[0]}"
    for name, shape in expected.items():
        source, first, last = sources.get(name, ("", None, None))
        with torch.no_grad():
            if source and tensors[source][first:last].shape == shape:
                llama.get_parameter(name).copy_(tensors[source][first:last])
            elif name.endswith("o_proj.bias"):
                llama.get_parameter(name).zero_()
            else:
                return f"it has no {name} as a Llama has"
    ids = torch.randint(0, _SMALL["vocab_size"], (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    difference = 0.0
    # The last positions show a rotation that is scaled beyond the length of the first training.
    for start in (0, max(model.config.max_position_embeddings - _LENGTH, 0)):
        inputs = {"input_ids": ids, "position_ids": torch.arange(start, start + _LENGTH)[None], "use_cache": False}
        with torch.no_grad():
            found, expected_logits = small(**inputs).logits, llama(**inputs).logits
        difference = max(difference, float((found - expected_logits).abs().max() / expected_logits.abs().max()))
    return None if difference < _TOLERANCE else f"with the same weights a Llama's logits differ by {difference:.0%}"


def _llama_config(model: Any, width: int, shapes: dict[str, torch.Size]) -> Any:
    """Config of the Llama with the weights of `model` and FFN width `width`."""
    from transformers import LlamaConfig

    config = model.config
    fields = {name: copy.deepcopy(getattr(config, name)) for name in (*_NEEDED, *_OPTIONAL) if hasattr(config, name)}
    biases = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "qkv_proj.bias")
    converted = LlamaConfig(
        **fields,
        intermediate_size=width,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden_act="silu",
        attention_bias=any(name.endswith(biases) for name in shapes),
        mlp_bias=False,
    )
    converted.dtype = config.dtype
    converted.architectures = ["LlamaForCausalLM"]
    return converted


def _llama_sources(config: Any, shapes: dict[str, torch.Size]) -> Sources:
    """Source of each tensor of the Llama with `config` in a model with tensors `shapes`; fused tensors are split."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    width = config.intermediate_size
    fused = {
        "self_attn.qkv_proj": (("q_proj", 0, q), ("k_proj", q, q + kv), ("v_proj", q + kv, q + 2 * kv)),
        "mlp.gate_up_proj": (("gate_proj", 0, width), ("up_proj", width, 2 * width)),
    }
    sources: Sources = {}
    for name in shapes:
        stem, _, kind = name.rpartition(".")
        block, _, module = stem.rpartition(".")
        pieces = fused.get(f"{block.rpartition('.')[2]}.{module}")
        if pieces is None:
            sources[name] = (name, None, None)
        else:
            sources |= {f"{block}.{part}.{kind}": (name, first, last) for part, first, last in pieces}
    return sources
