"""Write a model that is a Llama under another name as a Llama, whose FFN may have the biases that a merge needs.

Support is determined from the model, not looked up: its config must say nothing that a Llama does not do (windows,
rotations of a part, scaled rotations of another kind), its tensors must be a Llama's after splitting fused
projections, and a small model of its class, with the very settings of its config, must give the logits of a Llama with
the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from braces_cli.core.errors import first_line
from braces_cli.core.models.ffn import FFN
from braces_cli.export.form import REFUSALS, Form, Plan, Role, on_meta, refuse, tensor_shapes

_NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters",
)  # fmt: skip
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "tie_word_embeddings", "use_cache")
_ROTATIONS = ("default", "linear", "llama3", "yarn", "dynamic")
# What makes a model small without changing what it does.
_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_HEAD = 8
_LENGTH = 48
# Its logits differ from a Llama's by rounding only.
_TOLERANCE = 1e-5

Sources = dict[str, tuple[str, int | None, int | None]]


def llama_plan(model: Any, ffns: Sequence[FFN], form: Form, wider: int, gate: tuple[float, float]) -> Plan:
    """The plan of a gated model whose own class has no biases to switch on.

    Raises:
        ModelError: it is no Llama; says what is different.
    """
    import transformers

    why = "its gated FFN has no biases to switch on, and it is no Llama ({})"
    reason = _config_differs(model, form) or _differs(model)
    if reason:
        raise refuse(model, why.format(reason))
    shapes_of_base = tensor_shapes(model)
    width = ffns[0].value_vectors
    config = llama_config(model, width, shapes_of_base)
    sources = split_sources(config, shapes_of_base)
    config.mlp_bias, config.intermediate_size = True, wider
    target = on_meta(transformers.LlamaForCausalLM, config)
    shapes = tensor_shapes(target)
    roles: dict[str, Role] = {}
    for index, ffn in enumerate(ffns):
        for part, dim in (("gate", 0), ("up", 0), ("value", 1)):
            name = f"model.layers.{ffn.layer}.mlp.{'down' if part == 'value' else part}_proj"
            roles[f"{name}.weight"] = Role(index, part, dim)
            roles[f"{name}.bias"] = Role(index, f"{part}.bias", 0)
    missing = [name for name in shapes if name not in sources and not name.endswith(".bias")]
    if missing or set(sources) - set(shapes):
        odd = (missing or sorted(set(sources) - set(shapes)))[0]
        raise refuse(model, why.format(f"the tensor {odd}"))
    return Plan("b", config, "LlamaForCausalLM", shapes, sources, roles, form, width, wider, gate)


def _config_differs(model: Any, form: Form) -> str | None:
    """What the config says that no Llama does, in words; these are things that a short text cannot show."""
    config = model.config
    if config.get_text_config() is not config:
        return "it takes more than text"
    lacking = [name for name in _NEEDED if getattr(config, name, None) is None]
    if lacking:
        return f"its config has no {lacking[0]}"
    if form.activation(torch.tensor([0.5])) != functional.silu(torch.tensor([0.5])):
        return f"its activation is {form.name}, a Llama's SiLU"
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
        return f"its positions are rotated in the way of {kind}"
    parts = {
        1.0,
        float(rope.get("partial_rotary_factor") or 1),
        float(getattr(config, "partial_rotary_factor", 0) or 1),
    }
    return f"only {min(parts):g} of each head is rotated" if len(parts) > 1 else None


def llama_config(model: Any, width: int, shapes: dict[str, torch.Size]) -> Any:
    """The config of the Llama with the weights of `model`, before its FFN is widened."""
    from transformers import LlamaConfig

    config = model.config
    heads = config.num_attention_heads
    fields = {name: copy.deepcopy(getattr(config, name)) for name in (*_NEEDED, *_CARRIED) if hasattr(config, name)}
    biased = any(name.endswith(("q_proj.bias", "qkv_proj.bias", "k_proj.bias", "v_proj.bias")) for name in shapes)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    converted = LlamaConfig(
        **fields, intermediate_size=width, head_dim=head, hidden_act="silu", attention_bias=biased, mlp_bias=False
    )
    converted.dtype = config.dtype
    converted.architectures = ["LlamaForCausalLM"]
    return converted


def split_sources(config: Any, shapes: dict[str, torch.Size]) -> Sources:
    """Where each tensor of the Llama `config` comes from, for a model with tensors `shapes`; fused ones are split."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    width = config.intermediate_size
    fused = {
        "self_attn.qkv_proj": (("q_proj", 0, q), ("k_proj", q, q + kv), ("v_proj", q + kv, q + 2 * kv)),
        "mlp.gate_up_proj": (("gate_proj", 0, width), ("up_proj", width, 2 * width)),
    }
    sources: Sources = {}
    for name in shapes:
        stem, _, kind = name.rpartition(".")
        pieces = next((parts for ending, parts in fused.items() if stem.endswith(ending)), None)
        if pieces is None:
            sources[name] = (name, None, None)
            continue
        block = stem.rpartition(".")[0]
        sources.update({f"{block}.{part}.{kind}": (name, first, last) for part, first, last in pieces})
    return sources


def take(tensors: dict[str, Tensor], source: tuple[str, int | None, int | None]) -> Tensor:
    """The tensor that a source names, a view."""
    name, first, last = source
    return tensors[name][first:last]


def _differs(model: Any) -> str | None:
    """How a small model of the same class and settings differs from a Llama with its weights; None: it does not."""
    import transformers

    settings = {name: value for name, value in model.config.to_dict().items() if name not in _SMALL}
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == model.config.num_hidden_layers:
            settings[name] = value[:2]
    if settings.get("head_dim") is not None:
        settings["head_dim"] = _HEAD
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0) | {"dtype": "float32"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            small = type(model)(type(model.config)(**{**settings, **_SMALL, **special})).float().eval()
        except REFUSALS as error:
            return f"no small model of its class can be built: {first_line(error, 100)}"
        _draw(small)
    tensors = small.state_dict()
    shapes = tensor_shapes(small)
    config = llama_config(small, _SMALL["intermediate_size"], shapes)
    llama = transformers.LlamaForCausalLM(config).float().eval()
    sources, expected = split_sources(config, shapes), tensor_shapes(llama)
    odd = sorted(set(sources) - set(expected))
    if odd:
        return f"a Llama has no {odd[0]}"
    for name, shape in expected.items():
        with torch.no_grad():
            if name in sources and take(tensors, sources[name]).shape == shape:
                llama.get_parameter(name).copy_(take(tensors, sources[name]))
            elif name.endswith("o_proj.bias"):
                llama.get_parameter(name).zero_()
            else:
                return f"it has no {name} as a Llama has"
    difference = max(
        _difference(small, llama, start) for start in (0, max(model.config.max_position_embeddings - _LENGTH, 0))
    )
    return None if difference < _TOLERANCE else f"with the same weights a Llama's logits differ by {difference:.0%}"


def _difference(one: Any, other: Any, start: int) -> float:
    """How far logits of two models differ, relative to the largest, on tokens whose positions begin at `start`.

    The last positions show a rotation that is scaled beyond the length of a first training.
    """
    ids = torch.randint(0, _SMALL["vocab_size"], (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "position_ids": torch.arange(start, start + _LENGTH).unsqueeze(0), "use_cache": False}
    with torch.no_grad():
        a, b = one(**inputs).logits, other(**inputs).logits
    return float((a - b).abs().max() / b.abs().max())


def _draw(model: Any) -> None:
    """Weights large enough, norms and biases uneven enough for a difference to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.15)
