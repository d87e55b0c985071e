"""How the output of an FFN joins the residual stream."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.residual_join import residual_factors
from tests.conftest import tiny_model
from tests.core.architectures import tiny

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_an_output_that_is_added_unchanged_has_the_factor_1(name, dtype):
    """Exactly, whatever rounding makes of the measurement."""
    model = tiny_model(name, dtype)
    assert residual_factors(model, find_ffns(model), IDS) == [1.0, 1.0]


def test_a_constant_factor_is_measured():
    """Granite multiplies what it adds to the stream; each layer has its own figure."""
    model = tiny("granite")
    for layer, factor in zip(model.model.layers, (0.22, 0.5), strict=False):
        layer.residual_multiplier = factor
    assert residual_factors(model, find_ffns(model)[:2], IDS) == [0.22, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "olmo2", "bert"])
def test_a_norm_between_is_no_factor(name, dtype):
    """Norms behind the FFN and norms behind the sum."""
    model = tiny(name).to(dtype)
    assert set(residual_factors(model, find_ffns(model), IDS)) == {None}


def test_nothing_stays_behind():
    """The hooks are taken off, also where the model fails in between."""
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(IDS).logits
    residual_factors(model, find_ffns(model), IDS)
    with pytest.raises(IndexError):
        residual_factors(model, find_ffns(model), torch.tensor([[10**6]]))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
