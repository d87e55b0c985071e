"""The relevance module: projection, scores, cached factors."""

from typing import Any

import pytest
import torch

from braces_cli.core.adapter.layer import RelevanceModule, orthonormal_rows
from braces_cli.core.adapter.model import attach
from braces_cli.core.adapter.reference import orthonormal_rows_ref, weights_ref
from braces_cli.core.models.load import pick_device
from braces_cli.core.models.weights import double
from tests.conftest import open_gates, tiny_model
from tests.core.comparison import logits_of, relative


def test_orthonormal_rows_equal_gram_schmidt():
    """Cholesky and row by row give the same R, and R R^T = I."""
    weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = orthonormal_rows(weight)
    assert torch.allclose(rows, orthonormal_rows_ref(weight), atol=1e-12)
    assert torch.allclose(rows @ rows.mT, torch.eye(5, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("relevance_to", "gate"), [("input", 0.3), ("input", -200.0), ("output", 0.5)])
def test_relevance_scores_are_those_of_the_reference(relevance_to, gate):
    """Times g they are the change of the weights; they do not depend on the gate of the input, also at g = 0."""
    generator = torch.Generator().manual_seed(0)
    adapter_layer = RelevanceModule(3, 8, generator=generator, scale=0.7, relevance_to=relevance_to)
    h, values = torch.randn(5, 8, generator=generator), torch.randn(8, 11, generator=generator)
    scores, _ = adapter_layer.relevance_scores(h, values)
    with torch.no_grad():
        dict(adapter_layer.named_parameters())["diagonal" if relevance_to == "output" else "gate"].fill_(gate)
    after, change = adapter_layer.relevance_scores(h, values)
    assert torch.equal(after, scores) == (relevance_to == "input")
    assert torch.allclose(change, weights_ref(torch.zeros(5, 11), h, values, adapter_layer), rtol=1e-5, atol=1e-6)


def test_cached_factors_follow_every_change_of_a_parameter():
    """In-place updates and writes through `.data` both change the logits."""
    model = tiny_model()
    adapter = attach(model, 4)
    first = logits_of(model)
    with torch.no_grad():
        adapter.adapted_ffns[0][1].gate.add_(3.0)
    second = logits_of(model)
    assert not torch.equal(first, second)
    # Version counters do not count this; some optimizers write in this way.
    adapter.adapted_ffns[0][1].weight.data.add_(0.5)
    model.train()
    model.eval()
    assert not torch.equal(logits_of(model), second)


def test_casting_the_model_does_not_round_the_projection():
    """`model.to(bfloat16)` after attaching does not change the parameters of the adapter."""
    model = tiny_model()
    adapter = attach(model, 4)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    model.to(torch.bfloat16)
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())


def test_the_projection_is_float32_under_autocast():
    """Mixed precision rounds products of the base, never R."""
    adapter = attach(tiny_model(), 4)
    open_gates(adapter)
    ffn, adapter_layer = adapter.adapted_ffns[0]
    plain = adapter_layer.projection()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter_layer.projection(), plain)
        down, up = adapter_layer.factors(ffn.values(), torch.float32)
    assert torch.equal(down, plain)
    assert relative(up, adapter_layer.factors(ffn.values(), torch.float32)[1]) == 0


def test_relevance_by_hand():
    """Two neurons, rank 1: r = c (R v)(R h) / sqrt(1), and the weights change by g r."""
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    h = torch.tensor([[3.0, 4.0]])
    w = torch.tensor([[0.5, -0.5]])
    adapter_layer = RelevanceModule(1, 2, scale=3.0)
    with torch.no_grad():
        adapter_layer.weight.copy_(torch.tensor([[0.0, 5.0]]))
        adapter_layer.gate.zero_()
    out = weights_ref(w, h, values, adapter_layer)
    assert torch.allclose(out, torch.tensor([[0.5 + 0.0, -0.5 + 0.5 * 3.0 * (2.0 * 4.0)]]))
    assert torch.allclose(adapter_layer(w @ values.mT, h, values), out @ values.mT)


class OnAppleGPU(torch.Tensor):
    """A tensor in memory that says it is on an Apple GPU and refuses float64 and linear algebra."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("cpu", "to"):
            return args[0].as_subclass(torch.Tensor if func.__name__ == "cpu" else cls)
        assert "linalg" not in func.__name__
        assert func.__name__ != "double"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_an_apple_gpu_needs_no_float64_and_no_linear_algebra(monkeypatch, caplog):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with caplog.at_level("INFO", "braces"):
        assert pick_device("mps").type == "mps"
    assert "computed on the CPU" in caplog.text
    plain = RelevanceModule(4, 16).weight.detach() + 0.1
    weight = plain.as_subclass(OnAppleGPU)
    rows = orthonormal_rows(weight)
    assert type(rows) is OnAppleGPU
    assert torch.equal(rows.cpu(), orthonormal_rows(plain))
    assert (double(weight).dtype, type(double(weight))) == (torch.float64, torch.Tensor)


def test_few_tokens_are_multiplied_in_float32():
    """On a CPU, where products of few rows in 16 bits are slow; only the sum is rounded."""
    generator = torch.Generator().manual_seed(0)
    adapter_layer = RelevanceModule(3, 32, generator=generator, scale=20.0).requires_grad_(False)
    output, h = (torch.randn(2, 4, 32, generator=generator).bfloat16() for _ in range(2))
    values = torch.randn(32, 52, generator=generator).bfloat16()
    exact = adapter_layer(output.float(), h.float(), values.float())
    assert torch.equal(adapter_layer(output, h, values), exact.bfloat16())
