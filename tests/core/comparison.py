"""Compare the fast path of an adapter with its reference implementation."""

from contextlib import nullcontext
from typing import Any

import torch

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.adapter.reference import reference
from braces_cli.core.models.load import input_device

TOKENS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a-b| / max|b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def squared_error(a: torch.Tensor, truth: torch.Tensor) -> float:
    """Sum of squared differences."""
    return float((a.double() - truth.double()).square().sum())


def logits_of(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Logits without gradients and without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(tokens.to(input_device(model)), use_cache=False).logits
    return logits


def run(
    model: Any, adapter: Adapter, use_reference: bool, conditions: Any = None, tokens: torch.Tensor = TOKENS
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of a scalar of them, by the fast path or by the reference implementation."""
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    with reference(adapter, conditions) if use_reference else nullcontext():
        logits = model(tokens.to(input_device(model)), use_cache=False).logits
    logits.double().logsumexp(-1).square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters()}


def assert_equal(
    fast: tuple[torch.Tensor, dict[str, torch.Tensor]],
    slow: tuple[torch.Tensor, dict[str, torch.Tensor]],
    tolerance: float = 1e-5,
) -> None:
    """Assert that two results of `run` are equal: logits within the tolerance, gradients within twice of it."""
    assert relative(fast[0], slow[0]) < tolerance
    for name, gradient in slow[1].items():
        assert relative(fast[1][name], gradient) < 2 * tolerance, name
