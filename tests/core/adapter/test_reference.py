"""The fast path against the paper's formula, on every architecture: values and gradients, four dtypes."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from braces_cli.core.adapter.model import attach
from tests.conftest import ARCHITECTURES, open_gates, tiny_model
from tests.core.comparison import TOKENS, assert_equal, relative, run, squared_error


@pytest.mark.parametrize(("name", "rank"), [*((name, 4) for name in ARCHITECTURES), ("llama", 1), ("gpt2", 32)])
def test_logits_and_gradients_equal_the_reference_in_float32(name, rank, device):
    """float32 within 1e-5 relative, gradients within 2e-5."""
    model = tiny_model(name).to(device)
    base = model(TOKENS.to(device)).logits.detach()
    adapter = attach(model, rank)
    open_gates(adapter)
    fast, slow = run(model, adapter, False), run(model, adapter, True)
    assert relative(fast[0], base) > 1e-3
    if rank == 32:
        # R spans the whole space: a rotation changes nothing, and the gradient is rounding.
        slow = (slow[0], {name: gradient for name, gradient in slow[1].items() if name.endswith("gate")})
    assert_equal(fast, slow)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_equal_the_reference_in_float64(name, device):
    """float64 within 1e-10 relative, gradients within 2e-10."""
    model = tiny_model(name, torch.float64).to(device)
    adapter = attach(model, 4)
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.double()
    open_gates(adapter)
    assert_equal(run(model, adapter, False), run(model, adapter, True), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((torch.bfloat16, name) for name in ARCHITECTURES),
        *((torch.float16, name) for name in ("llama", "opt", "gpt2")),
    ],
)
def test_half_precision_error_is_at_most_twice_that_of_the_reference(dtype, name, device):
    """Errors of logits and gradients against the float32 model with the same (rounded) weights.

    Each seed has two gates only, so the ratio of their errors is largely chance in a few seeds (3.7 in four, 1.8 in
    sixteen, at most): 16 seeds, and a slack of one unit of bfloat16 rounding, 2^-8 of the norm.
    """
    ours: dict[str, float] = defaultdict(float)
    plain: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for seed in range(16):
        model = tiny_model(name, dtype, seed).to(device)
        adapter = attach(model, 4)
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
        slack = 2**-8 * size[kind] ** 0.5 if kind == "gate" else 0.0
        assert 0 < error**0.5 <= 2 * plain[kind] ** 0.5 + slack, kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_each_example_is_steered_by_its_attributes(name, device):
    """Two attributes, a different strength in each row, gradients included."""
    model = tiny_model(name).to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    states = torch.randn(2, len(adapter.adapted_ffns), 32, generator=torch.Generator().manual_seed(3)).to(device)
    strengths = torch.tensor([[1.5, 0.0], [-2.0, 0.5]], device=device)
    adapter.condition(states, strengths)
    fast = run(model, adapter, False)
    adapter.condition(None)
    terms = {layer: [(states[k, i], strengths[:, k]) for k in range(2)] for i, layer in enumerate(adapter.layers)}
    assert relative(fast[0], run(model, adapter, False)[0]) > 1e-3
    assert_equal(fast, run(model, adapter, True, terms))


def test_the_comparison_can_fail(device):
    """An error of one hundredth in a gate exceeds the tolerance."""
    model = tiny_model().to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, _ = run(model, adapter, False)
    with torch.no_grad():
        adapter.adapted_ffns[0][1].gate.add_(0.01)
    assert relative(fast, run(model, adapter, True)[0]) > 1e-5
