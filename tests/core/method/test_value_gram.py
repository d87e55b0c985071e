"""W_V W_V^T kept while an adapter learns: the same numbers, never stale, gone when it is no longer needed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from braces_cli.core.adapter.gram import CachedGram, _CachedProduct, cacheable, gram
from braces_cli.core.adapter.model import attach
from braces_cli.core.models.weights import StoredValues
from tests.conftest import open_gates, tiny_model
from tests.core.method.test_reference import TOKENS, relative, run
from tests.core.models.test_moe import tiny_moe


def learner(name="llama", dtype=torch.float32, **overrides):
    """A tiny model, an adapter on it that learns, and what is kept of its first layer."""
    model = tiny_model(name, dtype, **overrides)
    adapter = attach(model, 4)
    if dtype == torch.float64:
        for _, adapter_layer in adapter.adapted_ffns:
            adapter_layer.double()
    open_gates(adapter)
    return model, adapter, adapter.adapted_ffns[0][1]._cached_gram


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("keep", [True, False])
def test_values_and_gradients_equal_the_reference_with_and_without_it(monkeypatch, name, dtype, tolerance, keep):
    """Forward and backward of every layer really go by way of it, or of W_V."""
    model, adapter, kept = learner(name, dtype)
    if not keep:
        adapter.save_memory()
    calls = []
    real = _CachedProduct.backward
    monkeypatch.setattr(_CachedProduct, "backward", staticmethod(lambda *args: calls.append(1) or real(*args)))
    fast, fast_grads = run(model, adapter, False)
    assert len(calls) == (len(adapter.adapted_ffns) if keep else 0)
    assert bool(kept.nbytes) == keep
    slow, slow_grads = run(model, adapter, True)
    assert relative(fast, slow) < tolerance
    for key, grad in slow_grads.items():
        assert relative(fast_grads[key], grad) < 2 * tolerance, key


@pytest.mark.parametrize("d", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_the_dtype_of_what_it_is_multiplied_with(d, dtype):
    """Slabs of any number of rows, blocks of columns that do not come out even."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d, 1100, generator=generator).to(dtype)
    for x in (torch.randn(d, 3, generator=generator), torch.randn(3, d, generator=generator).mT):
        wide = weight.double()
        x.requires_grad_()
        found = CachedGram().product(weight, x)
        grad = torch.randn(d, 3, generator=generator)
        (back,) = torch.autograd.grad(found, x, grad)
        assert found.dtype == torch.float32
        assert relative(found, wide @ (wide.mT @ x.double())) < 1e-5
        assert relative(back, wide @ (wide.mT @ grad.double())) < 1e-5


def test_it_is_made_once_and_anew_for_another_value_matrix():
    """Changed in place, replaced, moved to another address, another dtype of x; never a stale product."""
    generator = torch.Generator().manual_seed(0)
    part = nn.Linear(24, 6, bias=False).requires_grad_(False)
    x = torch.randn(6, 3, generator=generator)
    kept = CachedGram()

    def check(x):
        first = kept._slabs
        assert relative(kept.product(part.weight, x), gram(part.weight.to(x.dtype), x)) < 1e-5
        made = kept._slabs
        kept.product(part.weight, x)
        assert kept._slabs is made  # and not once more
        return made is not first

    assert check(x)
    assert not check(x + 1)
    part.weight.mul_(2)
    assert check(x)
    part.weight = nn.Parameter(torch.randn(6, 24, generator=generator), requires_grad=False)
    assert check(x)
    part.weight.data = torch.randn(6, 24, generator=generator)
    assert check(x)
    assert check(x.double())


def test_it_is_no_part_of_the_model_and_goes_when_learning_ends():
    """Not in the state dict, a copy or a pickle; freed by eval mode, a move and detaching, kept by train mode."""
    model, adapter, kept = learner()
    names = list(model.state_dict())

    def again():
        run(model, adapter, False)
        assert kept.nbytes > 0

    again()
    assert list(model.state_dict()) == names
    assert len(list(model.buffers())) == len(list(tiny_model().buffers()))
    assert copy.deepcopy(model).model.layers[0].mlp.relevance._cached_gram.nbytes == 0
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).nbytes == 0
    model.train()
    assert kept.nbytes > 0
    model.eval()
    assert kept.nbytes == 0
    again()
    model.to(torch.float64)
    assert kept.nbytes == 0
    model.float()
    again()
    adapter.detach()
    assert kept.nbytes == 0


def test_inference_neither_uses_nor_makes_it():
    """A trained adapter has the bits of a loaded one, and no extra memory."""
    model, adapter, kept = learner()
    run(model, adapter, False)
    with torch.no_grad():
        trained = model(TOKENS).logits
    loaded, fresh, other = learner()
    for (_, one), (_, two) in zip(adapter.adapted_ffns, fresh.adapted_ffns, strict=True):
        two.load_state_dict(one.state_dict())
    for _, adapter_layer in fresh.adapted_ffns:
        adapter_layer.requires_grad_(False)
    assert torch.equal(loaded(TOKENS).logits, trained)
    assert kept.nbytes > 0
    assert other.nbytes == 0


def test_it_is_kept_only_where_it_is_small():
    """Not of a stack of experts, a matrix that is taller than wide, or an offloaded one; of a packed one it is."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for shape, kept in (((2, 6, 24), False), ((6, 6), False), ((6, 7), True)):
        one = CachedGram()
        one.product(torch.ones(shape), x)
        assert bool(one.nbytes) == kept, shape
    part = nn.Linear(24, 6)
    values, one = StoredValues(part), CachedGram()
    assert relative(one.product(values, x), gram(values, x)) < 1e-5
    assert one.nbytes > 0
    part._hf_hook = type("Hook", (), {"offload": True})()
    assert not cacheable(values)
    adapter = attach(tiny_moe("qwen2_moe"), 4)
    assert all(adapter_layer._cached_gram is None for _, adapter_layer in adapter.adapted_ffns)
