"""The fast path against the paper's formula, on every architecture: values and gradients, three dtypes."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from braces_cli.core.adapter.gram import gram
from braces_cli.core.adapter.layer import RelevanceModule, orthonormal_rows
from braces_cli.core.adapter.model import attach
from braces_cli.core.adapter.reference import orthonormal_rows_ref, reference, weights_ref
from braces_cli.core.models.load import input_device
from tests.conftest import ARCHITECTURES, open_gates, tiny_model

TOKENS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a-b| / max|b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def squared_error(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth.double()).square().sum())


def run(model, adapter, use_reference, conditions=None):
    """Logits and gradients of a scalar of them, by the fast path or by the reference."""
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    tokens = TOKENS.to(input_device(model))
    if use_reference:
        with reference(adapter, conditions):
            logits = model(tokens).logits
    else:
        logits = model(tokens).logits
    logits.double().logsumexp(-1).square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize(("name", "rank"), [*((name, 4) for name in ARCHITECTURES), ("llama", 1), ("gpt2", 32)])
def test_logits_and_gradients_equal_the_reference_in_float32(name, rank, device):
    """float32 within 1e-5 relative, gradients too."""
    model = tiny_model(name).to(device)
    base = model(TOKENS.to(device)).logits.detach()
    adapter = attach(model, rank)
    open_gates(adapter)
    fast, fast_grads = run(model, adapter, False)
    slow, slow_grads = run(model, adapter, True)
    assert relative(fast, base) > 1e-3  # it does something
    assert relative(fast, slow) < 1e-5
    for key, grad in slow_grads.items():
        # Where the rank is the width, R spans everything: turning it changes nothing, the gradient is pure rounding.
        if rank == 32 and key.endswith("weight"):
            continue
        assert relative(fast_grads[key], grad) < 2e-5, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_equal_the_reference_in_float64(name, device):
    """float64 within 1e-10 relative."""
    model = tiny_model(name, torch.float64).to(device)
    adapter = attach(model, 4)
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.double()
    open_gates(adapter)
    fast, fast_grads = run(model, adapter, False)
    slow, slow_grads = run(model, adapter, True)
    assert relative(fast, slow) < 1e-10
    for key, grad in slow_grads.items():
        assert relative(fast_grads[key], grad) < 1e-10, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_is_no_worse_than_twice_the_references_own_error(name, device):
    """Both are held to the float32 model with the same (rounded) weights: logits and gradients.

    The gradients of the gates are eight numbers in all, so the ratio of their two errors is largely chance: for them
    two units of bfloat16 rounding (2^-7 of their norm) are allowed on top.
    """
    ours: dict[str, float] = defaultdict(float)
    plain: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for seed in range(4):
        model = tiny_model(name, torch.bfloat16, seed).to(device)
        adapter = attach(model, 4)
        open_gates(adapter, seed)
        fast, fast_grads = run(model, adapter, False)
        slow, slow_grads = run(model, adapter, True)
        assert fast.dtype == torch.bfloat16
        model.float()
        truth, true_grads = run(model, adapter, True)
        ours["logits"] += squared_error(fast, truth)
        plain["logits"] += squared_error(slow, truth)
        for key, grad in true_grads.items():
            kind = key.rpartition(".")[2]
            ours[kind] += squared_error(fast_grads[key], grad)
            plain[kind] += squared_error(slow_grads[key], grad)
            size[kind] += float(grad.square().sum())
    slack = {"gate": 2**-7}
    for kind, error in ours.items():
        allowed = slack.get(kind, 0.0) * size[kind] ** 0.5
        assert error**0.5 <= 2 * plain[kind] ** 0.5 + allowed, kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_each_example_is_steered_by_its_own_attributes(name, device):
    """Per-example attribute terms, two attributes, a different strength in each row, gradients included."""
    model = tiny_model(name).to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    states = torch.randn(2, len(adapter.adapted_ffns), 32, generator=torch.Generator().manual_seed(3)).to(device)
    strengths = torch.tensor([[1.5, 0.0], [-2.0, 0.5]], device=device)
    adapter.condition(states, strengths)
    fast, fast_grads = run(model, adapter, False)
    adapter.condition(None)
    plain, _ = run(model, adapter, False)
    terms = {layer: [(states[k, i], strengths[:, k]) for k in range(2)] for i, layer in enumerate(adapter.layers)}
    slow, slow_grads = run(model, adapter, True, terms)
    assert relative(fast, plain) > 1e-3
    assert relative(fast, slow) < 1e-5
    for key, grad in slow_grads.items():
        assert relative(fast_grads[key], grad) < 2e-5, key


def test_the_comparison_can_fail(device):
    """A gate that is one hundredth off shows."""
    model = tiny_model().to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, _ = run(model, adapter, False)
    with torch.no_grad():
        adapter.adapted_ffns[0][1].gate.add_(0.01)
    slow, _ = run(model, adapter, True)
    assert relative(fast, slow) > 1e-5


def test_orthonormal_rows_equal_gram_schmidt():
    """Cholesky and row by row give the same R, and R R^T = I."""
    weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = orthonormal_rows(weight)
    assert torch.allclose(rows, orthonormal_rows_ref(weight), atol=1e-12)
    assert torch.allclose(rows @ rows.mT, torch.eye(5, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("columns", [7, 256, 257, 700])
def test_gram_of_a_bfloat16_matrix_is_computed_in_float32(columns, device):
    """Block by block, odd sizes included; the gradient is the same product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, columns, generator=generator).bfloat16().to(device)
    x = torch.randn(6, 3, generator=generator).to(device).requires_grad_()
    grad = torch.randn(6, 3, generator=generator).to(device)
    result = gram(weight, x)
    result.backward(grad)
    wide = weight.double()
    assert relative(result, wide @ (wide.mT @ x.double())) < 1e-5
    assert relative(x.grad, wide @ (wide.mT @ grad.double())) < 1e-5


def test_relevance_by_hand():
    """Two neurons, rank 1: r = c (R v)(R h) / sqrt(1), and the weights move by g r."""
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    h = torch.tensor([[3.0, 4.0]])
    w = torch.tensor([[0.5, -0.5]])
    adapter_layer = RelevanceModule(1, 2, scale=3.0)
    with torch.no_grad():
        adapter_layer.weight.copy_(torch.tensor([[0.0, 5.0]]))
        adapter_layer.gate.zero_()
    out = weights_ref(w, h, values, adapter_layer)
    assert torch.allclose(out, torch.tensor([[0.5 + 0.0, -0.5 + 0.5 * 3.0 * (2.0 * 4.0)]]))
    moved = adapter_layer(w @ values.mT, h, values)
    assert torch.allclose(moved, out @ values.mT)


def test_relevance_scores_are_the_references():
    """What inspection shows, times g, is what is added to the weights."""
    generator = torch.Generator().manual_seed(0)
    adapter_layer = RelevanceModule(3, 8, generator=generator)
    with torch.no_grad():
        adapter_layer.gate.copy_(torch.randn(adapter_layer.gate.shape, generator=generator))
    adapter_layer.set_scale(0.7)
    h, values = torch.randn(5, 8, generator=generator), torch.randn(8, 11, generator=generator)
    added = weights_ref(torch.zeros(5, 11), h, values, adapter_layer)
    assert relative(adapter_layer.g * adapter_layer.relevance_scores(h, values), added) < 1e-5


def test_relevance_scores_of_a_gate_that_is_shut_are_numbers():
    """The paper's relevance leaves the gate out, so it is the same at every gate, at g = 0, too."""
    adapter_layer = RelevanceModule(3, 8, generator=torch.Generator().manual_seed(0))
    h, values = torch.randn(5, 8), torch.randn(8, 11)
    open_ = adapter_layer.relevance_scores(h, values)
    with torch.no_grad():
        adapter_layer.gate.fill_(-200.0)
    assert float(adapter_layer.g.detach()) == 0
    assert torch.equal(adapter_layer.relevance_scores(h, values), open_)
