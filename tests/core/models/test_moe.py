"""Mixtures of experts against an expert-by-expert reference: values, gradients, steering, cache, files."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from braces_cli.core.adapter.model import attach
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import Experts, MixtureFFN, _is_presorted, find_ffns
from tests.conftest import GATED, open_gates
from tests.core.method.test_reference import relative, run

# 48: torch's grouped product wants rows of a multiple of 16 bytes.
COMMON = {
    **GATED,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "num_experts_per_tok": 2,
}
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
# Config, sizes, and the parts of the last layer: (module lists or fused, shared experts).
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, ["Experts"]),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
        ["Experts", "FFN"],
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}, ["Experts"]),
    "olmoe": ("OlmoeConfig", {"num_experts": 4}, ["Experts"]),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK, ["Experts", "FFN"]),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size_mlp": 28, "head_dim": 8, "interleave_moe_layer_step": 1},
        ["Experts", "FFN"],
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 8}, ["Experts"]),
}


def tiny_moe(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    kind, sizes, _ = MODELS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**COMMON, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Experts' weights are not drawn by every model's initialisation.
            if parameter.ndim == 3:
                parameter.normal_(std=0.15)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found(name):
    """Routed experts, fused or not, and shared ones, on every layer."""
    model = tiny_moe(name)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1]
    assert isinstance(ffns[-1], MixtureFFN)
    assert [type(part).__name__ for part in ffns[-1].parts] == MODELS[name][2]
    stacked = ffns[-1].parts[0]
    assert isinstance(stacked, Experts)
    assert stacked.value_matrix().shape[:2] == (4, 32)
    assert model.get_parameter(stacked.value_path(model)) is getattr(stacked.module, "down_proj")  # noqa: B009
    assert ffns[-1].value_matrix().shape == (32, ffns[-1].value_vectors)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_the_expert_by_expert_reference(name):
    """float32 within 1e-5 relative, gradients too."""
    model = tiny_moe(name)
    base = model(torch.tensor([[3, 4, 5]])).logits
    adapter = attach(model, 4)
    open_gates(adapter)
    assert relative(model(torch.tensor([[3, 4, 5]])).logits, base) > 1e-3
    fast, fast_grads = run(model, adapter, False)
    slow, slow_grads = run(model, adapter, True)
    assert relative(fast, slow) < 1e-5
    for kind in ("weight", "gate"):  # of all layers together: the gradient of one gate may be next to nothing
        keys = [key for key in slow_grads if key.endswith(kind)]
        ours, theirs = (torch.cat([grads[key].flatten() for key in keys]) for grads in (fast_grads, slow_grads))
        assert relative(ours, theirs) < 2e-5, kind


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_error_stays_within_twice_the_references(name):
    """Against the float32 model with the same rounded weights.

    A near-tie that rounding turns sends a token to other experts, for either of the two, so the middle token decides.
    """
    model = tiny_moe(name, torch.bfloat16)
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, _ = run(model, adapter, False)
    slow, _ = run(model, adapter, True)
    model.float()
    truth, _ = run(model, adapter, True)
    ours, plain = ((logits.double() - truth.double()).norm(dim=-1).median() for logits in (fast, slow))
    assert ours <= 2 * plain


@pytest.mark.parametrize("name", MODELS)
def test_each_example_is_steered_on_the_experts_it_meets(name):
    """s p_e B_e A h_c, a different strength in each row, and one constant for all."""
    model = tiny_moe(name)
    adapter = attach(model, 4)
    open_gates(adapter)
    states = torch.randn(1, len(adapter.adapted_ffns), 32, generator=torch.Generator().manual_seed(3))
    plain, _ = run(model, adapter, False)
    for strengths in (torch.tensor([[1.5], [-2.0]]), torch.tensor([[0.7], [0.7]])):
        adapter.condition(states, strengths)
        fast, _ = run(model, adapter, False)
        adapter.condition(None)
        terms = {layer: [(states[0, i], strengths[:, 0])] for i, layer in enumerate(adapter.layers)}
        slow, _ = run(model, adapter, True, terms)
        assert relative(fast, plain) > 1e-3
        assert relative(fast, slow) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_equals_generation_without(name):
    """Greedy, token for token; and detached, the base is as it was, bit for bit."""
    model = tiny_moe(name)
    tokens = torch.tensor([[3, 4, 5, 6]])
    base = model(tokens).logits
    adapter = attach(model, 4)
    open_gates(adapter)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(tokens, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **kwargs))
    adapter.detach()
    assert torch.equal(model(tokens).logits, base)


class _PassesOn:
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class _Sorted(torch.nn.Module):
    def forward(self, hidden): ...


class _Routed(torch.nn.Module):
    def forward(self, hidden, index, weights, **kwargs): ...


class _PassesOnSorted(_PassesOn, _Sorted): ...


class _PassesOnRouted(_PassesOn, _Routed): ...


class _SaysNothing(_PassesOn, torch.nn.Module): ...


def test_what_experts_are_called_with_is_read_from_the_class_that_says_it():
    """Not from torch's own Module, whose `forward` takes anything."""
    sorts = {kind: _is_presorted(kind()) for kind in (_Sorted, _PassesOnSorted, _Routed, _PassesOnRouted)}
    assert sorts == {_Sorted: True, _PassesOnSorted: True, _Routed: False, _PassesOnRouted: False}
    with pytest.raises(ModelError, match="_SaysNothing is called with 0 tensors"):
        _is_presorted(_SaysNothing())


def test_mixtral_by_hand():
    """The whole layer written out, expert by expert and neuron by neuron, from the model's own weights."""
    model = tiny_moe("mixtral")
    adapter = attach(model, 4)
    open_gates(adapter)
    block = model.model.layers[0].mlp
    adapter_layer = adapter.adapted_ffns[0][1]
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    fast = block(h.view(1, 5, 32))[0]
    _, weights, index = block.gate(h)
    projection, g = adapter_layer.projection(), torch.sigmoid(adapter_layer.gate)
    slow = torch.zeros_like(h)
    for token in range(5):
        for place in range(2):
            expert = int(index[token, place])
            gate, up = (block.experts.gate_up_proj[expert] @ h[token]).chunk(2)
            values = block.experts.down_proj[expert]
            for j in range(values.shape[1]):
                r = (projection @ values[:, j]) @ (projection @ h[token]) * adapter_layer.scale / 2  # sqrt of rank 4
                w = F.silu(gate[j]) * up[j] + g * r
                slow[token] += weights[token, place] * w * values[:, j]
    assert relative(fast, slow) < 1e-5


def test_a_module_list_of_experts_shares_one_projection_and_gate():
    """Each expert is a feed-forward network of its own; the model weighs what it writes."""
    from torch import nn

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            return x + 0.75 * self.experts[0](x) + 0.25 * self.experts[2](x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model()
    adapter = attach(model, 4)
    open_gates(adapter)
    assert [len(ffn.parts) for ffn, _ in adapter.adapted_ffns] == [3, 3]
    assert adapter.parameter_count() == 2 * (4 * 8 + 1)
    x = torch.randn(5, 8)
    expected = x
    for (_, adapter_layer), layer in zip(adapter.adapted_ffns, model.layers, strict=True):
        term = expected
        for p, expert in ((0.75, layer.experts[0]), (0.25, layer.experts[2])):
            w = expert.act(expert.up(expected))
            r = (
                (expected @ adapter_layer.projection().mT)
                @ (adapter_layer.projection() @ expert.down.weight)
                * adapter_layer.scale
                / 2
            )
            term = term + p * ((w + adapter_layer.g * r) @ expert.down.weight.mT + expert.down.bias)
        expected = term
    assert relative(model(x), expected) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_without_an_adapter_a_mixture_is_pushed_whatever_its_router_does(name):
    """Against a reference that adds s * scale * p to what each decoder layer returns; nothing stays behind."""
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.vector import Attribute

    model = tiny_moe(name)

    class Opened:
        base = SimpleNamespace(model=model)
        adapter = None
        ffns = find_ffns(model)

    generator = torch.Generator().manual_seed(1)
    hidden, reference = torch.randn(2, 2, 32, generator=generator)
    attribute = Attribute("x", [], hidden, reference, torch.tensor([50.0, 20.0]), [0, 1], {})
    session: Any = Opened()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(torch.tensor([[0, 5, 6, 7, 8]])).logits
        return found

    bare = logits()
    with steered(session, [(attribute, 2.0)], [0, 1]) as sizes:
        fast = logits()
    vectors = 2.0 * attribute.scale[:, None] * (hidden - reference)
    handles = []
    for layer, vector in zip(model.model.layers, vectors, strict=True):
        handles.append(layer.register_forward_hook(partial(_plus, vector)))
    slow = logits()
    for handle in handles:
        handle.remove()
    assert relative(fast, slow) < 1e-5
    assert relative(fast, bare) > 1e-2
    assert torch.equal(logits(), bare)
    assert [size.layer for size in sizes] == [0, 1]
    assert torch.allclose(torch.cat([size.total for size in sizes]), vectors)


def _plus(vector: torch.Tensor, module: Any, args: tuple, output: Any) -> Any:
    return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
