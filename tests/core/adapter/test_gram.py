"""Products with W_V W_V^T, and its cache in training: exact, never stale, freed after training."""

import copy
import io

import pytest
import torch
from torch import nn

from braces_cli.core.adapter.gram import CachedGram, _CachedProduct, cacheable, gram
from braces_cli.core.adapter.model import attach
from braces_cli.core.models.weights import StoredValues
from tests.conftest import open_gates, tiny_model
from tests.core.architectures import tiny
from tests.core.comparison import assert_equal, relative, run


def training_model(name="llama", dtype=torch.float32, **overrides):
    """A tiny model, its adapter, and the cache of its first layer."""
    model = tiny_model(name, dtype, **overrides)
    adapter = attach(model, 4)
    if dtype == torch.float64:
        for _, adapter_layer in adapter.adapted_ffns:
            adapter_layer.double()
    open_gates(adapter)
    return model, adapter, adapter.adapted_ffns[0][1]._cached_gram


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("enable", [True, False])
def test_values_and_gradients_equal_the_reference_with_and_without_the_cache(
    monkeypatch, name, dtype, tolerance, enable
):
    """Forward and backward of every layer use the cache, or W_V."""
    model, adapter, cached = training_model(name, dtype)
    if not enable:
        for _, adapter_layer in adapter.adapted_ffns:
            adapter_layer.cache_gram(False)
    calls = []
    real = _CachedProduct.backward
    monkeypatch.setattr(_CachedProduct, "backward", staticmethod(lambda *args: calls.append(1) or real(*args)))
    fast = run(model, adapter, False)
    assert len(calls) == (len(adapter.adapted_ffns) if enable else 0)
    assert bool(cached._slabs) == enable
    assert_equal(fast, run(model, adapter, True), tolerance)


@pytest.mark.parametrize("product", [gram, lambda weight, x: CachedGram().product(weight, x)], ids=["plain", "cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "columns"), [(6, 7), (6, 256), (6, 257), (1, 700), (2, 1100), (5, 1100), (9, 1100)])
def test_products_are_computed_in_the_dtype_of_the_input(d, columns, dtype, product, device):
    """Blocks of columns, odd sizes included, and a transposed input; the gradient is the same product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d, columns, generator=generator).to(dtype).to(device)
    wide = weight.double()
    for drawn in (torch.randn(d, 3, generator=generator), torch.randn(3, d, generator=generator).mT):
        x, grad = drawn.to(device).requires_grad_(), torch.randn(d, 3, generator=generator).to(device)
        found = product(weight, x)
        (back,) = torch.autograd.grad(found, x, grad)
        assert found.dtype == torch.float32
        assert relative(found, wide @ (wide.mT @ x.double())) < 1e-5
        assert relative(back, wide @ (wide.mT @ grad.double())) < 1e-5


def test_the_cache_follows_the_value_matrix():
    """W_V changed in place, replaced, at another address, or x in another dtype."""
    generator = torch.Generator().manual_seed(0)
    part = nn.Linear(24, 6, bias=False).requires_grad_(False)
    x = torch.randn(6, 3, generator=generator)
    cached = CachedGram()

    def check(x):
        first = cached._slabs
        assert relative(cached.product(part.weight, x), gram(part.weight.to(x.dtype), x)) < 1e-5
        made = cached._slabs
        cached.product(part.weight, x)
        assert cached._slabs is made
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


def test_the_cache_is_not_saved_and_is_freed_after_training():
    """Not in the state dict, a copy or a pickle; freed by eval mode, a move and detaching."""
    model, adapter, cached = training_model()
    names = list(model.state_dict())

    def again():
        run(model, adapter, False)
        assert cached._slabs

    again()
    assert list(model.state_dict()) == names
    assert len(list(model.buffers())) == len(list(tiny_model().buffers()))
    assert not copy.deepcopy(model).model.layers[0].mlp.relevance._cached_gram._slabs
    file = io.BytesIO()
    torch.save(cached, file)
    file.seek(0)
    assert not torch.load(file, weights_only=False)._slabs
    model.train()
    assert cached._slabs
    model.eval()
    assert not cached._slabs
    again()
    model.to(torch.float64)
    assert not cached._slabs
    model.float()
    again()
    adapter.detach()
    assert not cached._slabs


def test_only_small_products_are_cached():
    """Not of stacked experts, of a square matrix, or of an offloaded one; of a packed one."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for shape, cached in (((2, 6, 24), False), ((6, 6), False), ((6, 7), True)):
        one = CachedGram()
        one.product(torch.ones(shape), x)
        assert bool(one._slabs) == cached, shape
    part = nn.Linear(24, 6)
    values, one = StoredValues(part), CachedGram()
    assert relative(one.product(values, x), gram(values, x)) < 1e-5
    assert one._slabs
    part._hf_hook = type("Hook", (), {"offload": True})()
    assert not cacheable(values)
    adapter = attach(tiny("qwen2_moe"), 4)
    assert all(adapter_layer._cached_gram is None for _, adapter_layer in adapter.adapted_ffns)


def test_gram_of_stored_values_is_differentiable():
    """gradcheck in float64, through the unpacking."""
    values = StoredValues(nn.Linear(13, 6, dtype=torch.float64))
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gram(values, x), (x,))
