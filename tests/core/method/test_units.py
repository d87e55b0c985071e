"""A base whose value matrices are multiplied by a number and whose up projections are divided by it computes the same:
an adapter must train to the same function on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from braces_cli.core.adapter.model import attach
from tests.conftest import tiny_model
from tests.core.method.test_reference import TOKENS, relative


def rescaled(a: float) -> Any:
    """A tiny Llama in float64, W_V times `a` and the up projection divided by it."""
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(a)
            layer.mlp.up_proj.weight.div_(a)
    return model


def trained(a: float, form: str, scales: list[float] | None = None) -> torch.Tensor:
    """Logits after 20 steps of Adam at the default rates."""
    model = rescaled(a)
    adapter = attach(model, 4, form=form, scales=scales)
    modules = [adapter_layer.double() for _, adapter_layer in adapter.adapted_ffns]
    groups = [
        {"params": [matrix for adapter_layer in modules for _, matrix in adapter_layer.matrices()], "lr": 0.05},
        {"params": [adapter_layer.gate for adapter_layer in modules], "lr": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(20):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("a", [0.25, 4.0])
@pytest.mark.parametrize("form", ["signed", "untied", "whitened"])
def test_a_rescaled_base_trains_to_the_same_function(form: str, a: float) -> None:
    """Within 1e-8 in float64; training does move it."""
    plain = trained(1.0, form)
    with torch.no_grad():
        assert relative(rescaled(1.0)(TOKENS).logits, plain) > 1e-2
    assert relative(trained(a, form), plain) < 1e-8


@pytest.mark.parametrize("form", ["paper", "signed", "untied"])
def test_without_units_it_does_not(form: str) -> None:
    """The factor that is left out is what makes the law: the paper's form has none."""
    ones = [1.0, 1.0]
    assert relative(trained(4.0, form, ones), trained(1.0, form, ones)) > 1e-2
