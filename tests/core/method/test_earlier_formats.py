"""Files that an earlier version wrote load, and give the logits that it got with them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from braces_cli.core.attributes.intervention import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import open_session

FIXTURE = Path(__file__).parents[2] / "fixtures" / "format_1"


def test_an_adapter_and_an_attribute_of_format_1_give_the_logits_of_their_time() -> None:
    """Version 1 of the format, whose relevance scale is 1."""
    expected = load_file(FIXTURE / "logits.safetensors")
    session = open_session(None, str(FIXTURE / "adapter"), LoadOptions(device="cpu", dtype="float32"))
    ids = torch.tensor([encode(session.base.tokenizer, "The film is").ids])
    attribute = find_attribute(session, "sunny", FIXTURE / "attributes")
    with torch.no_grad():
        plain = session.base.model(ids).logits[0, -1]
        with steered(session, [(attribute, 2.0)]):
            pushed = session.base.model(ids).logits[0, -1]
    assert float((plain - expected["logits"]).abs().max()) < 1e-5 * float(expected["logits"].abs().max())
    assert float((pushed - expected["steered"]).abs().max()) < 1e-5 * float(expected["steered"].abs().max())
    assert float((pushed - plain).abs().max()) > 0.1  # the attribute does something
