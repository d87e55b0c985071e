"""c of each layer: bases that compute the same function get the same adapters."""

from typing import Any

import pytest
import torch

from braces_cli.core.adapter.model import attach
from braces_cli.core.adapter.scale import measure_scales
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import find_ffns
from tests.conftest import tiny_model
from tests.core.architectures import tiny
from tests.core.comparison import TOKENS, relative

TEXTS = [[0, 5, 9, 40], [0, 7, 7, 31, 12, 60]]


def rescaled(kind: str, a: float) -> Any:
    """A tiny Llama in float64: W_V times `a` and up over it, or the norm's weight times `a` and gate and up over it."""
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            mlp, grown = layer.mlp, layer.mlp.down_proj if kind == "values" else layer.post_attention_layernorm
            grown.weight.mul_(a)
            for shrunk in (mlp.up_proj,) if kind == "values" else (mlp.gate_proj, mlp.up_proj):
                shrunk.weight.div_(a)
    return model


RELEVANCE = pytest.mark.parametrize("relevance", ["input", "output"])


def trained(model: Any, relevance: str, scales: list[float] | None = None) -> torch.Tensor:
    """Logits after 20 steps of AdamW."""
    scales = scales or measure_scales(model, find_ffns(model), TEXTS, relevance)
    adapter = attach(model, 4, scales=scales, relevance_to=relevance)
    modules = [adapter_layer.double() for _, adapter_layer in adapter.adapted_ffns]
    groups = [
        {"params": [p for each in modules for p in each.parameters() if p.ndim == 2], "lr": 0.05},
        {"params": [p for each in modules for p in each.parameters() if p.ndim == 1], "lr": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(20):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("a", [0.25, 4.0])
@pytest.mark.parametrize("kind", ["values", "norm"])
@RELEVANCE
def test_a_rescaled_base_trains_to_the_same_function(relevance: str, kind: str, a: float) -> None:
    """Within 1e-8 in float64; training changes it, and without c the two would differ.

    The FFN's output does not depend on how its input is scaled, so c is not needed there.
    """
    plain, ones = trained(rescaled(kind, 1.0), relevance), [1.0, 1.0]
    with torch.no_grad():
        assert relative(rescaled(kind, 1.0)(TOKENS).logits, plain) > 1e-2
    assert relative(trained(rescaled(kind, a), relevance), plain) < 1e-8
    without = relative(trained(rescaled(kind, a), relevance, ones), trained(rescaled(kind, 1.0), relevance, ones))
    assert without > 1e-4 or (relevance, kind) == ("output", "norm")


@RELEVANCE
def test_the_scale_by_hand(relevance: str) -> None:
    """32 times the rms of the FFN's output over that of W_V W_V^T h (or y), over all texts' tokens but the first."""
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    ffns = find_ffns(model)
    inputs: list[list[torch.Tensor]] = [[] for _ in ffns]
    outputs: list[list[torch.Tensor]] = [[] for _ in ffns]
    for layer, ins, outs in zip(model.model.layers, inputs, outputs, strict=True):
        layer.mlp.register_forward_pre_hook(lambda module, args, seen=ins: seen.append(args[0][0][1:]))
        layer.mlp.register_forward_hook(lambda module, args, output, seen=outs: seen.append(output[0][1:]))
    found = measure_scales(model, ffns, TEXTS, relevance)
    for ffn, ins, outs, scale in zip(ffns, inputs, outputs, found, strict=True):
        values = ffn.value_matrix()
        path = torch.cat(ins if relevance == "input" else outs) @ values @ values.mT
        assert scale == pytest.approx(float(32 * (torch.cat(outs).norm() / path.norm())), rel=1e-12)


@RELEVANCE
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text"])
def test_the_scale_of_a_mixture_counts_pairs_of_a_token_and_an_expert(relevance: str, name: str) -> None:
    """Outputs before the router's weights, against the experts run one by one on the tokens sent to them."""
    model = tiny(name).double().requires_grad_(False)
    ffn = next(ffn for ffn in find_ffns(model) if any(hasattr(part, "presorted") for part in ffn.parts))
    (part,) = (part for part in ffn.parts if hasattr(part, "presorted"))
    calls: list[tuple] = []
    handles = [part.module.register_forward_hook(lambda module, args, output: calls.append((args, output)))]
    shared = [(other, []) for other in ffn.parts if other is not part]
    handles += [other.watch(seen.append) for other, seen in shared]
    (scale,) = measure_scales(model, [ffn], TEXTS, relevance)
    for handle in handles:
        handle.remove()
    output = path = 0.0
    values = part.value_matrix()
    for other, seen in shared:
        h = torch.cat([each.reshape(-1, 32)[1:] for each in seen])
        y = other.host(h)
        query = h if relevance == "input" else y
        value = other.value_matrix()
        output, path = output + float(y.square().sum()), path + float((query @ value @ value.mT).square().sum())
    for args, out in calls:
        for expert, value in enumerate(values):
            if part.presorted:
                rows, written = (tensor.view(len(values), -1, 32)[expert, 1:] for tensor in (args[0], out))
                sent = rows.norm(dim=-1) > 0
                h, y = rows[sent], written[sent]
            else:
                tokens, chosen = args[0].reshape(-1, 32)[1:], args[1].flatten(0, -2)[1:]
                h = tokens[(chosen == expert).any(dim=-1)]
                index = torch.full((len(h), 1), expert)
                y = part.module.forward(h, index, torch.ones(len(h), 1, dtype=h.dtype)) if len(h) else h
            query = h if relevance == "input" else y
            output, path = output + float(y.square().sum()), path + float((query @ value @ value.mT).square().sum())
    assert scale == pytest.approx(32 * (output / path) ** 0.5, rel=1e-6)


def test_the_scale_of_an_ffn_without_output_is_one() -> None:
    """W_V is zero, or the FFN's output is."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.zero_()
    assert measure_scales(model, find_ffns(model), TEXTS) == [1.0, 1.0]


def test_a_base_that_does_not_run_on_tokens_alone_is_refused() -> None:
    """An assistant of Gemma 4 needs the keys of another model."""
    model = tiny("gemma4_assistant")
    with pytest.raises(ModelError, match="does not run on tokens alone"):
        measure_scales(model, find_ffns(model), TEXTS)
