"""Weights that are quantised, of an unknown packing, or not finite."""

import importlib.util
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.gram import gram
from braces_cli.core.adapter.model import attach, attach_stored, open_session
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import save_attributes
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import find_ffns, parameter_total
from braces_cli.core.models.load import load_base
from braces_cli.core.models.weights import StoredValues, _through_module, check_finite
from braces_cli.core.options import QUANTISATIONS, LoadOptions
from braces_cli.inspection.vocabulary import LogitLens, value_tokens
from tests.conftest import make_adapter, open_gates, tiny_model, tiny_tokenizer
from tests.core.comparison import TOKENS, assert_equal, logits_of, relative, run


def require(method: str) -> None:
    """Skip a test if the package of a quantisation is not installed."""
    package = "bitsandbytes" if method.startswith("bnb") else "torchao"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT TESTED ON A QUANTISED BASE: {package} is not installed (pip install 'braces-cli[quantize]')")


@pytest.fixture(params=QUANTISATIONS)
def method(request):
    require(request.param)
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
    """Value matrices that the model multiplies with."""
    return [ffn.value_matrix() for ffn in find_ffns(model)]


# The 8-bit product of bitsandbytes also rounds the input, to 1/127 of each token's largest number. The input is w + g r
# in the reference, and w in the fast path.
TOLERANCE = {"bnb-8bit": 0.05}


def test_logits_and_gradients_equal_the_reference_on_the_same_quantised_base(folder, method, device):
    """float32 within 1e-5, as on any base."""
    model = load(folder, method, device=device).model
    bare = logits_of(model)
    adapter = attach(model, 4)
    open_gates(adapter)
    fast = run(model, adapter, False)
    assert relative(fast[0], bare) > 0.1
    assert_equal(fast, run(model, adapter, True), TOLERANCE.get(method, 1e-5))


def test_unpacked_values_are_those_that_the_packed_base_computes_with(folder, method):
    """W_V equals the outputs for unit vectors; embeddings and head are not packed."""
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
def test_a_quantised_16_bit_base_is_near_the_reference(folder, method, dtype, device):
    """Logits in the base's dtype, projection in float32."""
    model = load(folder, method, dtype, device).model
    adapter = attach(model, 4)
    open_gates(adapter)
    fast, _ = run(model, adapter, False)
    slow, _ = run(model, adapter, True)
    assert fast.dtype == getattr(torch, dtype)
    assert adapter.adapted_ffns[0][1].weight.dtype == torch.float32
    assert relative(fast, slow) < max(4 * torch.finfo(fast.dtype).eps, TOLERANCE.get(method, 0.0))


def test_one_adapter_fits_every_packing_of_its_base(folder, method, tmp_path):
    """Trained packed and loaded plain, and the reverse."""
    packed = open_session(str(folder), None, LoadOptions(device="cpu", quantize=method))
    plain = open_session(str(folder), None, LoadOptions(device="cpu"))
    for one, other in ((packed, plain), (plain, packed)):
        adapter_folder = make_adapter(one, tmp_path / f"{id(one)}")
        bare = logits_of(other.base.model)
        adapter = attach_stored(other.base, find_adapter(str(adapter_folder)))
        assert relative(logits_of(other.base.model), bare) > 0.1
        adapter.detach()
        assert torch.equal(logits_of(other.base.model), bare)


def test_readers_of_value_matrices_read_packed_ones(folder, method):
    """Products, tokens of value vectors and samples equal those of the unpacked matrices."""
    session = open_session(str(folder), None, LoadOptions(device="cpu", quantize=method))
    ffn = session.ffns[1]
    values = ffn.value_matrix()
    state = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert relative(gram(ffn.values(), state.unsqueeze(1)).squeeze(1), values @ (values.mT @ state)) < 1e-5
    rows = list(value_tokens(LogitLens(session.base), session.ffns[1:2], [3, 159], 5))
    assert [row["index"] for row in rows] == [3, 159]
    assert all(math.isfinite(token["score"]) for row in rows for token in row["tokens"])
    plain = load_base(str(folder), LoadOptions(device="cpu")).model
    for own, expected in zip(find_ffns(plain), weights(session.base.model), strict=True):
        own.value.weight.data.copy_(expected)
    samples = [each.samples for each in find_ffns(plain)]
    assert torch.equal(torch.stack(samples), session.base.samples)


@pytest.mark.slow
def test_a_packed_base_compiles(tmp_path):
    """The graph breaks at each unpacking; values and gradients do not change."""
    require("int8")
    torch._dynamo.reset()
    # One layer: a compiler takes many seconds for each of torchao's tensors.
    model = load(_saved("llama", tmp_path, num_hidden_layers=1), "int8").model
    adapter = attach(model, 4)
    open_gates(adapter)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert relative(compiled(TOKENS).logits, logits_of(model)) < 1e-5
        adapter.adapted_ffns[0][1].gate.add_(1.0)
        assert relative(compiled(TOKENS).logits, logits_of(model)) < 1e-5
    _, expected = run(model, adapter, False)
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    compiled(TOKENS).logits.double().logsumexp(-1).square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert relative(parameter.grad, expected[name]) < 2e-5, name


class _Packed(nn.Module):
    """An unknown packing: sizes, integers, a scale, and a forward pass."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("numbers", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = nn.Parameter(torch.randn(linear.out_features) * 0.1)

    def forward(self, x):
        return nn.functional.linear(x, self.numbers.to(x.dtype) * self.scale, self.bias)


def test_an_unknown_packing_is_unpacked_by_unit_vectors():
    """It has no `weight`, no `dequantize`, and a bias."""
    model = tiny_model("llama", intermediate_size=700)
    for layer in model.model.layers:
        layer.mlp.down_proj = _Packed(layer.mlp.down_proj)
    adapter = attach(model, 4)
    open_gates(adapter)
    packed = adapter.adapted_ffns[0][0].value
    assert relative(adapter.adapted_ffns[0][0].value_matrix(), packed.numbers * packed.scale) < 1e-6
    assert_equal(run(model, adapter, False), run(model, adapter, True))


def _saved(name, folder, **sizes):
    tiny_model(name, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


_WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found(value, dtype):
    """In every dtype; integers, empty weights and the meta device are accepted."""
    model = tiny_model(dtype=dtype)
    weights = {**dict(model.named_parameters()), "packed": torch.ones(2, dtype=torch.uint8), "empty": torch.empty(0)}
    check_finite(weights, "base")
    with torch.no_grad():
        weights[_WEIGHT][3, 5] = value
    with pytest.raises(ModelError, match=f"base: the weight {_WEIGHT} holds numbers that are not finite"):
        check_finite(weights, "base")
    check_finite({name: weight.to("meta") for name, weight in weights.items()}, "base")


@pytest.fixture
def damaged(model_dir, tmp_path):
    """The tiny base with one NaN."""
    folder = tmp_path / "damaged"
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[_WEIGHT][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "args",
    [
        ("train", "--data", "rows.jsonl", "--max-steps", "1", "--output-dir", "new/out"),
        ("eval", "--tasks", "perplexity", "--task-data", "perplexity=rows.jsonl", "--output-dir", "new/out"),
        ("export", "slots", "--output-dir", "new/out"),
    ],
    ids=lambda args: args[0],
)
def test_every_command_names_the_weight_and_leaves_nothing(args, damaged, braces, tmp_path, monkeypatch):
    """Exit 4 without a new folder; the folder of an evaluation keeps its record, for --resume."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "the film is good"}\n')
    outcome = braces(*args, "--model", damaged)
    assert outcome.code == 4, outcome.err
    assert f"{damaged}: the weight {_WEIGHT} holds numbers that are not finite" in outcome.err
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if damaged not in path.parents)
    kept = ["new", "new/out", "new/out/run.json"] if args[0] == "eval" else []
    assert left == ["damaged", *kept, "rows.jsonl"]


def test_a_steering_vector_that_is_too_large_is_an_error(braces, model_dir, monkeypatch):
    """If the vector is not finite, and if the model's scores are not."""
    steer = ("steer", "--model", model_dir, "--prompt", "the", "--attribute", "sad", "--s")
    outcome = braces(*steer, 1e38)
    assert outcome.code == 2
    assert "--s: the vector that is added in layer 0 is not finite" in outcome.err
    for extra in (("--temperature", 0), ("--num-samples", 3)):
        outcome = braces(*steer, 1e7, "--dtype", "float16", *extra)
        assert outcome.code == 4, outcome.out
        assert "scores of the next token are not finite" in outcome.err
        assert "lower --s" in outcome.err


@pytest.mark.parametrize("part", ["hidden", "reference", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_an_attribute_that_is_not_finite_is_damaged(part, value, session, tmp_path):
    """Each tensor is checked; no base computes zeros."""
    path = tmp_path / "sad.safetensors"
    save_attributes(path, [build_attribute(session, "sad", ["sad"])])
    tensors = load_file(path)
    tensors[f"sad.{part}"].fill_(value)
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, metadata=file.metadata())
    message = "" if value == 0 else "has numbers that are not finite"
    with pytest.raises(ModelError, match=f"sad.{part} .*{message}"):
        find_attribute(session, "sad", tmp_path)


def test_cached_factors_follow_a_change_of_parameter_or_weight(folder, method):
    """The cache distinguishes packed weights."""
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


def test_no_dense_matrix_is_saved_for_the_backward_pass(folder, method):
    """The backward pass unpacks W_V again."""
    adapter = attach(load(folder, method).model, 4)
    ffn, adapter_layer = adapter.adapted_ffns[0]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        _, up = adapter_layer.factors(ffn.values(), torch.float32)
    assert kept
    assert max(kept) < 64 * 160
    up.square().sum().backward()
    assert float(adapter_layer.weight.grad.abs().max()) > 0
