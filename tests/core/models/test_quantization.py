"""Quantised bases: against the reference on the same packed base, in training, and across packings."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.gram import gram
from braces_cli.core.adapter.model import attach, attach_stored, open_session
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import find_ffns, parameter_total
from braces_cli.core.models.identity import fingerprint
from braces_cli.core.models.load import check_quantize, input_device, load_base
from braces_cli.core.models.weights import StoredValues, _through_module
from braces_cli.core.options import QUANTISATIONS, LoadOptions
from braces_cli.inspection.vocabulary import value_tokens
from tests.conftest import make_adapter, open_gates, tiny_model, tiny_tokenizer
from tests.core.method.test_reference import TOKENS, relative, run

CPU = torch.device("cpu")


def _installed(method: str) -> None:
    package = "bitsandbytes" if method.startswith("bnb") else "torchao"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT TESTED ON A QUANTISED BASE: {package} is not installed (pip install 'braces-cli[quantize]')")


@pytest.fixture(params=QUANTISATIONS)
def method(request):
    _installed(request.param)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose widths divide into groups of 32."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", hidden_size=64, intermediate_size=160, max_position_embeddings=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder, method, dtype="float32", device="cpu"):
    return load_base(str(folder), LoadOptions(device=str(device), dtype=dtype, quantize=method))


def weights(model):
    """The value matrices as the model multiplies with them."""
    return [ffn.value_matrix() for ffn in find_ffns(model)]


def logits(model):
    with torch.no_grad():
        return model(TOKENS.to(input_device(model))).logits


# bitsandbytes' 8-bit product also rounds what it multiplies W with, to 1 in 127 of each token's largest number. The
# reference sends w + g r through it, the fast path only w.
TOLERANCE = {"bnb-8bit": 0.05}


def test_logits_and_gradients_equal_the_reference_on_the_same_quantised_base(folder, method, device):
    """float32 within 1e-5, as on any base."""
    model = load(folder, method, device=device).model
    bare = logits(model)
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, fast_grads = run(model, adapter, False)
    slow, slow_grads = run(model, adapter, True)
    assert relative(fast, bare) > 0.1
    tolerance = TOLERANCE.get(method, 1e-5)
    assert relative(fast, slow) < tolerance
    for key, grad in slow_grads.items():
        assert relative(fast_grads[key], grad) < 2 * tolerance, key


def test_the_base_is_really_packed_and_its_values_are_those_it_computes_with(folder, method):
    """Unpacked W_V is what the module makes of unit vectors; embeddings and head are as they were."""
    plain, packed = load_base(str(folder), LoadOptions(device="cpu")).model, load(folder, method).model
    for ffn, other in zip(find_ffns(packed), weights(plain), strict=True):
        assert isinstance(ffn.values(), StoredValues)
        values = ffn.value_matrix()
        assert values.shape == other.shape == (64, 160)
        assert 1e-4 < relative(values, other) < 0.3
        assert relative(_through_module(ffn.value), values) < (0.005 if method == "bnb-8bit" else 1e-6)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(packed, part)().weight, getattr(plain, part)().weight)
    assert parameter_total(packed) == parameter_total(plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_quantised_16_bit_base_keeps_its_dtype_and_stays_near_the_reference(folder, method, dtype, device):
    """Logits in the base's dtype, projection in float32."""
    model = load(folder, method, dtype, device).model
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, _ = run(model, adapter, False)
    slow, _ = run(model, adapter, True)
    assert fast.dtype == getattr(torch, dtype)
    assert adapter.adapted_ffns[0][1].weight.dtype == torch.float32
    assert relative(fast, slow) < max(4 * torch.finfo(fast.dtype).eps, TOLERANCE.get(method, 0.0))


def test_a_training_step_lowers_the_loss(folder, method, device):
    """Gradients flow through the packed layers to every projection and gate."""
    model = load(folder, method, device=device).model
    adapter = attach(model, 4)
    with torch.no_grad():
        for _, adapter_layer in adapter.adapted_ffns:
            adapter_layer.gate.fill_(-1.0)
    optimizer = torch.optim.SGD([p for _, p in adapter.named_parameters()], lr=0.02)
    losses, tokens = [], TOKENS.to(device)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        losses.append(float(loss))
        loss.backward()
        assert all(float(p.grad.abs().max()) > 0 for _, p in adapter.named_parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3


def test_cached_factors_follow_a_change_of_parameter_or_weight(folder, method):
    """The cache knows packed weights apart, though they have no address of their own."""
    model = load(folder, method).model
    adapter = attach(model, 4)
    open_gates(adapter)
    (ffn, adapter_layer), (other, _) = adapter.adapted_ffns
    with torch.no_grad():
        first = adapter_layer.factors(ffn.values(), torch.float32)[1]
        assert adapter_layer.factors(ffn.values(), torch.float32)[1] is first
        assert not torch.equal(adapter_layer.factors(other.values(), torch.float32)[1], first)
        adapter_layer.gate.add_(1.0)
        assert relative(adapter_layer.factors(ffn.values(), torch.float32)[1], first) > 1e-3


def test_nothing_dense_is_kept_for_the_backward_pass(folder, method):
    """Of W_V, packed or not, the adapter's part of a graph holds nothing; a backward pass unpacks anew."""
    adapter = attach(load(folder, method).model, 4)
    ffn, adapter_layer = adapter.adapted_ffns[0]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        _, up = adapter_layer.factors(ffn.values(), torch.float32)
    assert kept
    assert max(kept) < 64 * 160
    up.square().sum().backward()
    assert float(adapter_layer.weight.grad.abs().max()) > 0


def test_one_adapter_fits_every_packing_of_its_base(folder, method, tmp_path):
    """The fingerprint is of the checkpoint's files: trained packed, loaded plain, and the other way round."""
    packed = open_session(str(folder), None, LoadOptions(device="cpu", quantize=method))
    plain = open_session(str(folder), None, LoadOptions(device="cpu"))
    assert packed.base.fingerprint == plain.base.fingerprint
    for one, other in ((packed, plain), (plain, packed)):
        adapter_folder = make_adapter(one, tmp_path / f"{id(one)}")
        bare = logits(other.base.model)
        adapter = attach_stored(other.base, find_adapter(str(adapter_folder)))
        assert relative(logits(other.base.model), bare) > 0.1
        adapter.detach()
        assert torch.equal(logits(other.base.model), bare)


def test_everything_that_reads_value_matrices_reads_packed_ones(folder, method):
    """Products with them, value vectors' tokens and the hash over weights, as from the same numbers unpacked."""
    session = open_session(str(folder), None, LoadOptions(device="cpu", quantize=method))
    ffn = session.ffns[1]
    values = ffn.value_matrix()
    state = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert relative(gram(ffn.values(), state.unsqueeze(1)).squeeze(1), values @ (values.mT @ state)) < 1e-5
    rows = list(value_tokens(session, [1], [3, 159], 5))
    assert [row["index"] for row in rows] == [3, 159]
    assert all(math.isfinite(token["score"]) for row in rows for token in row["tokens"])
    plain = load_base(str(folder), LoadOptions(device="cpu")).model
    for own, expected in zip(find_ffns(plain), weights(session.base.model), strict=True):
        own.value.weight.data.copy_(expected)
    hashes = [fingerprint(m, find_ffns(m), None)["sha256"] for m in (plain, session.base.model)]
    assert hashes[0] == hashes[1]


def test_a_packed_base_compiles(tmp_path):
    """With a break of the graph around each unpacking; values and gradients as without."""
    _installed("int8")
    torch._dynamo.reset()
    # One layer: torchao's own tensors take a compiler many seconds each.
    model = load(_saved("llama", tmp_path, num_hidden_layers=1), "int8").model
    adapter = attach(model, 4)
    open_gates(adapter)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert relative(compiled(TOKENS).logits, logits(model)) < 1e-5
        adapter.adapted_ffns[0][1].gate.add_(1.0)
        assert relative(compiled(TOKENS).logits, logits(model)) < 1e-5
    _, expected = run(model, adapter, False)
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    compiled(TOKENS).logits.double().logsumexp(-1).square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert relative(parameter.grad, expected[name]) < 2e-5, name


class _Packed(nn.Module):
    """A packing that nothing knows: sizes, integers, a scale, and a forward pass."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("numbers", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = nn.Parameter(torch.randn(linear.out_features) * 0.1)

    def forward(self, x):
        return nn.functional.linear(x, self.numbers.to(x.dtype) * self.scale, self.bias)


def test_an_unknown_packing_is_reached_through_its_module():
    """No `weight`, no `dequantize`, a bias: unit vectors tell W_V."""
    model = tiny_model("llama", intermediate_size=700)
    for layer in model.model.layers:
        layer.mlp.down_proj = _Packed(layer.mlp.down_proj)
    adapter = attach(model, 4)
    open_gates(adapter)
    packed = adapter.adapted_ffns[0][0].value
    assert relative(adapter.adapted_ffns[0][0].value_matrix(), packed.numbers * packed.scale) < 1e-6
    fast, fast_grads = run(model, adapter, False)
    slow, slow_grads = run(model, adapter, True)
    assert relative(fast, slow) < 1e-5
    for key, grad in slow_grads.items():
        assert relative(fast_grads[key], grad) < 2e-5, key


def test_gram_of_stored_values_is_differentiable():
    """gradcheck, in float64, through the unpacking."""
    values = StoredValues(nn.Linear(13, 6, dtype=torch.float64))
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gram(values, x), (x,))


@pytest.mark.parametrize(("name", "package"), [("int8", "torchao"), ("bnb-4bit", "bitsandbytes")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    """Exit code 2, and what to install."""
    monkeypatch.setattr("braces_cli.core.models.load.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"pip install {package}"):
        check_quantize(name, CPU)


@pytest.mark.parametrize("name", ["bnb-8bit", "bnb-4bit"])
def test_a_bitsandbytes_without_this_device_is_refused(monkeypatch, name):
    """A release that knows CUDA only says so before the weights are loaded."""
    _installed(name)
    import bitsandbytes

    monkeypatch.delattr(bitsandbytes, "supported_torch_devices")
    with pytest.raises(ConfigError, match="runs on cuda, not on cpu"):
        check_quantize(name, CPU)
    check_quantize(name, torch.device("cuda"))


def test_gpt2_is_packed_by_bitsandbytes_and_refused_by_torchao(tmp_path):
    """Its layers are no `nn.Linear`: torchao would pass them over without a word."""
    folder = _saved("gpt2", tmp_path)
    _installed("int8")
    with pytest.raises(ConfigError, match="packs nothing in GPT2LMHeadModel"):
        load(folder, "int8")
    _installed("bnb-4bit")
    model = load(folder, "bnb-4bit").model
    assert isinstance(find_ffns(model)[0].values(), StoredValues)
    adapter = attach(model, 4)
    open_gates(adapter)
    assert relative(run(model, adapter, False)[0], run(model, adapter, True)[0]) < 1e-5


def _saved(name, folder, **sizes):
    tiny_model(name, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_checkpoint_that_is_quantised_already_is_not_quantised_again(folder, tmp_path):
    """Exit code 2; without --quantize it loads as it is."""
    _installed("int8")
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"already quantised \(gptq\)"):
        load(tmp_path, "int8")
