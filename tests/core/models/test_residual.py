"""How the output of an FFN joins the residual stream."""

import pytest
import torch

from braces_cli.core.attributes.pooling import residual_norms
from braces_cli.core.models.ffn import MixtureFFN, find_ffns, layer_stack
from braces_cli.core.models.residual import GAIN_STEP, residual_factors, residual_gains
from braces_cli.core.models.structure import layer_output, with_layer_output
from tests.conftest import tiny_model, tiny_tokenizer
from tests.core.architectures import tiny

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_an_output_that_is_added_unchanged_has_the_factor_1(name, dtype):
    """Rounding of the measurement is removed."""
    model = tiny_model(name, dtype)
    assert residual_factors(model, find_ffns(model), IDS) == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "olmo2", "bert"])
def test_a_model_with_a_norm_has_no_factor(name, dtype):
    """Norms after the FFN and after the sum."""
    model = tiny(name).to(dtype)
    assert set(residual_factors(model, find_ffns(model), IDS)) == {None}


@pytest.mark.parametrize("name", ["llama", "mixtral", "granite", "gemma2", "gemma4_text"])
def test_a_gain_is_the_movement_of_the_stream(name):
    """The factor, with experts too; after a norm the movement by a small vector, measured by hand."""
    model = tiny(name)
    if name == "granite":
        for layer in model.model.layers:
            layer.residual_multiplier = 0.22
    ffns = find_ffns(model)
    gains = residual_gains(model, ffns, IDS)
    if name in ("llama", "mixtral", "granite"):
        assert gains.tolist() == pytest.approx([0.22 if name == "granite" else 1.0] * len(ffns))
        return
    stack, ffn = layer_stack(model)[1], ffns[0]
    end, outputs, seen = ffn.host if isinstance(ffn, MixtureFFN) else ffn.value, [], []
    handle = end.register_forward_hook(lambda module, args, output: outputs.append(layer_output(output)))
    stack[0].register_forward_hook(lambda module, args, output: seen.append(layer_output(output)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    step = torch.randn(ffn.hidden_size, generator=torch.Generator().manual_seed(0))
    step *= GAIN_STEP * outputs[0].square().mean().sqrt()
    end.register_forward_hook(lambda module, args, out: with_layer_output(out, layer_output(out) + step))
    with torch.no_grad():
        model(IDS)
    expected = float((seen[1] - seen[0]).norm(dim=-1).median() / step.norm())
    assert float(gains[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["openai-gpt", "qwen4_exp_text"])
def test_layers_that_return_lists_or_several_streams_have_gains(name):
    """And a norm of the stream, which steering needs."""
    model = tiny(name)
    ffns = find_ffns(model)
    for found in (residual_gains(model, ffns, IDS), residual_norms(model, tiny_tokenizer(), ffns)):
        assert bool((found.isfinite() & (found > 0)).all())
