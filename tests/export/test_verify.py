"""The reference that an export is compared with."""

import pytest
import torch

from braces_cli.core.adapter.model import open_session
from braces_cli.core.options import LoadOptions
from braces_cli.export.run import Request
from braces_cli.export.verify import reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_missing_adapter_shows_even_below_rounding(request_: Request, dtype: str) -> None:
    """A weak adapter in bfloat16 changes less than rounding; no hook is left."""
    session = open_session(request_.model, request_.adapter, LoadOptions(device="cpu", dtype=dtype))
    assert session.adapter is not None
    for _, adapter_layer in session.adapter.adapted_ffns:
        adapter_layer.gate.data.sub_(0 if dtype == "float32" else 7)
    found = reference(session)
    assert (found.rounding < found.effect / 100) == (dtype == "float32")
    assert found.missing(found.logits) == 0
    with session.adapter.disabled(), torch.no_grad():
        bare = session.base.model(torch.tensor(found.question["ids"])).logits.float()
    assert found.missing(bare) > 0.9
    assert not any(layer._forward_hooks for layer in session.base.model.model.layers)
