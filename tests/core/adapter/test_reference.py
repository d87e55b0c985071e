"""The fast path against the formula, on every architecture: values and gradients, four dtypes, both relevances."""

from collections import defaultdict

import pytest
import torch

from braces_cli.core.adapter.model import attach
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.structure import add_to_output, layer_output
from tests.conftest import ARCHITECTURES, open_gates, tiny_model
from tests.core.architectures import tiny
from tests.core.comparison import TOKENS, assert_equal, logits_of, relative, run, squared_error
from tests.core.models.test_ffn import MIXTURES

RELEVANCE = pytest.mark.parametrize("relevance", ["input", "output"])


@RELEVANCE
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
@pytest.mark.parametrize(("name", "rank"), [*((name, 4) for name in ARCHITECTURES), ("llama", 1), ("gpt2", 32)])
def test_logits_and_gradients_equal_the_reference(name, rank, dtype, tolerance, relevance, device):
    """float32 within 1e-5 relative, float64 within 1e-10; gradients within twice of it."""
    model = tiny_model(name, dtype).to(device)
    base = model(TOKENS.to(device)).logits.detach()
    adapter = attach(model, rank, relevance_to=relevance)
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.to(dtype)
    open_gates(adapter)
    fast, slow = run(model, adapter, False), run(model, adapter, True)
    assert relative(fast[0], base) > 1e-3
    if rank == 32:
        # R spans the whole space: a rotation changes nothing, and the gradient is rounding.
        slow = (slow[0], {name: gradient for name, gradient in slow[1].items() if name.endswith("gate")})
    assert_equal(fast, slow, tolerance)


@pytest.mark.parametrize(
    ("dtype", "name", "relevance"),
    [
        *((torch.bfloat16, name, "input") for name in ARCHITECTURES),
        *((torch.float16, name, "input") for name in ("llama", "opt", "gpt2")),
        *((torch.bfloat16, name, "output") for name in ("llama", "opt", "gpt2")),
    ],
)
def test_half_precision_error_is_at_most_twice_that_of_the_reference(dtype, name, relevance, device):
    """Errors of logits and gradients against the float32 model with the same (rounded) weights.

    Each seed has two gates only, so the ratio of their errors is largely chance in a few seeds (3.7 in four, 1.8 in
    sixteen, at most): 16 seeds, and a slack of one unit of bfloat16 rounding, 2^-8 of the norm.
    """
    ours: dict[str, float] = defaultdict(float)
    plain: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for seed in range(16):
        model = tiny_model(name, dtype, seed).to(device)
        adapter = attach(model, 4, relevance_to=relevance)
        open_gates(adapter, seed)
        fast, fast_grads = run(model, adapter, False)
        slow, slow_grads = run(model, adapter, True)
        assert fast.dtype == dtype
        assert all(adapter_layer.weight.dtype == torch.float32 for _, adapter_layer in adapter.adapted_ffns)
        model.float()
        truth, true_grads = run(model, adapter, True)
        ours["logits"] += squared_error(fast, truth)
        plain["logits"] += squared_error(slow, truth)
        for key, grad in true_grads.items():
            kind = key.rpartition(".")[2]
            ours[kind] += squared_error(fast_grads[key], grad)
            plain[kind] += squared_error(slow_grads[key], grad)
            size[kind] += float(grad.square().sum())
    for kind, error in ours.items():
        slack = 2**-8 * size[kind] ** 0.5 if kind in ("gate", "diagonal") else 0.0
        assert 0 < error**0.5 <= 2 * plain[kind] ** 0.5 + slack, kind


@RELEVANCE
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_each_example_is_steered_by_its_attributes(name, relevance, device):
    """Two attributes, a different strength in each row, gradients included."""
    model = tiny_model(name).to(device)
    adapter = attach(model, 4, relevance_to=relevance)
    open_gates(adapter)
    states = torch.randn(2, len(adapter.adapted_ffns), 32, generator=torch.Generator().manual_seed(3)).to(device)
    strengths = torch.tensor([[1.5, 0.0], [-2.0, 0.5]], device=device)
    adapter.condition(states, strengths)
    fast = run(model, adapter, False)
    adapter.condition(None)
    terms = {layer: [(states[k, i], strengths[:, k]) for k in range(2)] for i, layer in enumerate(adapter.layers)}
    assert relative(fast[0], run(model, adapter, False)[0]) > 1e-3
    assert_equal(fast, run(model, adapter, True, terms))


@RELEVANCE
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_steered_for_each_example_and_token(name, relevance):
    """One attribute; a strength for each row, or the same strengths for each of its tokens."""
    model = tiny(name).double()  # in float32 the gradient of a single gate can be rounding
    adapter = attach(model, 4, relevance_to=relevance)
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.double()
    open_gates(adapter)
    states = torch.randn(1, len(adapter.adapted_ffns), 32, generator=torch.Generator().manual_seed(3)).double()
    strengths = torch.tensor([[1.5], [-2.0]], dtype=torch.float64)
    adapter.condition(states, strengths)
    fast = run(model, adapter, False)
    adapter.condition(states, strengths.unsqueeze(1).expand(-1, TOKENS.shape[1], -1))
    by_token = run(model, adapter, False)
    adapter.condition(None)
    terms = {layer: [(states[0, i], strengths[:, 0])] for i, layer in enumerate(adapter.layers)}
    assert relative(fast[0], run(model, adapter, False)[0]) > 1e-3
    slow = run(model, adapter, True, terms)
    assert_equal(fast, slow, 1e-10)
    assert_equal(by_token, slow, 1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_relevance_to_the_output_is_an_edit_of_the_value_vectors(name):
    """With W_V' = (I + B A) W_V, and the bias likewise, the bare base has the logits of the adapter."""
    model = tiny(name).double().requires_grad_(False)
    adapter = attach(model, 4, relevance_to="output")
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.double()
    open_gates(adapter)
    adapted, edits = logits_of(model), []
    with torch.no_grad():
        for ffn, adapter_layer in adapter.adapted_ffns:
            for part in ffn.parts:
                down, up = adapter_layer.factors(part.values(), torch.float64)
                edits.append((part, torch.eye(32, dtype=torch.float64) + up @ down))
        adapter.detach()
        assert relative(logits_of(model), adapted) > 1e-3
        for part, edit in edits:
            part.value_matrix().copy_(edit @ part.value_matrix())
            bias = getattr(getattr(part, "value", None), "bias", None)
            if bias is not None:
                bias.copy_(edit @ bias)
    assert relative(logits_of(model), adapted) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_steering_vector_is_added_after_relevance_to_the_output(name):
    """The side path reads the FFN's output without the vector: both add up."""
    model = tiny_model(name)
    adapter = attach(model, 4, layers=[1], relevance_to="output")
    open_gates(adapter)
    ((ffn, _),) = adapter.adapted_ffns
    outputs = []
    handle = layer_stack(model)[1][1].register_forward_hook(lambda *args: outputs.append(layer_output(args[2])))
    logits_of(model)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    added = add_to_output(ffn.output_module, vector)
    logits_of(model)
    added.remove()
    handle.remove()
    assert relative(outputs[1] - outputs[0], vector.expand_as(outputs[0])) < 1e-5


def test_the_comparison_can_fail(device):
    """An error of one hundredth in a gate exceeds the tolerance."""
    model = tiny_model().to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, _ = run(model, adapter, False)
    with torch.no_grad():
        adapter.adapted_ffns[0][1].gate.add_(0.01)
    assert relative(fast, run(model, adapter, True)[0]) > 1e-5
