"""Models that can be merged, and the reasons of refusals."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from braces_cli.core.errors import ModelError
from braces_cli.export.plan import Form
from tests.conftest import GATED, tiny_model
from tests.core.architectures import tiny
from tests.export.columns import merge_of
from tests.export.models import TOKENS, phi3

REFUSED = {
    "gemma": ("gemma", {}, "its activation is"),
    "qwen3": ("qwen3", {}, "a Llama has no model.layers.0.self_attn.k_norm.weight"),
    "mistral with a window": ("mistral", {"sliding_window": 16}, "sliding_window is 16"),
    "phi3 with a window": ("phi3", {"sliding_window": 16}, "sliding_window is 16"),
    "bloom": ("bloom", {}, "fixes the width of the FFN"),
    "mixtral": ("mixtral", {}, "it mixes experts"),
    "arcee": ("arcee", {}, "does not hold"),
    "gemma3n_text": ("gemma3n_text", {}, "different widths"),
    "falcon_h1": ("falcon_h1", {}, "computes something else"),
}


def refusal(model: Any) -> ModelError:
    """The error of planning a merge."""
    with pytest.raises(ModelError, match="cannot be merged") as caught:
        merge_of(model, 4, TOKENS, False)
    return caught.value


@pytest.mark.parametrize("case", REFUSED)
def test_a_merge_that_is_not_exact_is_refused(case: str) -> None:
    """The error has the reason and the command that works instead."""
    name, overrides, words = REFUSED[case]
    error = refusal(phi3(**overrides) if name == "phi3" else tiny_model(name, **overrides) if overrides else tiny(name))
    assert words in error.message
    assert "braces export code" in str(error.hint)
    # A mixture cannot have control vectors.
    assert ("control-vector" in str(error.hint)) == (name != "mixtral")


def test_late_positions_show_that_a_model_is_not_a_llama() -> None:
    """Ministral 3 scales queries beyond the length of its first training, which short texts do not show."""
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 64,
    }
    sizes = {**GATED, "max_position_embeddings": 256, "rope_parameters": rope, "sliding_window": None}
    model = AutoModelForCausalLM.from_config(transformers.Ministral3Config(**sizes)).eval()
    assert "a Llama's logits differ" in refusal(model).message


def test_activations_are_classified_by_their_values() -> None:
    """Half-linear activations, and constants that pass a gate unrounded in every dtype."""
    gelu, functional = torch.nn.functional.gelu, torch.nn.functional

    def form(activation: Any) -> Form:
        return Form(True, False, True, activation)

    for activation in (gelu, functional.silu, functional.relu, lambda z: gelu(z, approximate="tanh")):
        assert form(activation).is_half_linear
        assert form(activation).constant_gate == (32.0, 32.0)
    assert not form(lambda z: functional.relu(z) ** 2).is_half_linear
    assert not form(functional.mish).is_half_linear
    assert form(functional.sigmoid).constant_gate == (32.0, 1.0)
