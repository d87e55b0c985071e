"""Ways to run a base: compiled, checkpointed, with either attention, on several devices and on disk."""

import copy

import pytest
import torch

from braces_cli.core.adapter.layer import _cached_factors
from braces_cli.core.adapter.model import attach
from braces_cli.core.adapter.reference import reference
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.load import input_device, load_base
from braces_cli.core.models.weights import StoredValues
from braces_cli.core.options import LoadOptions
from tests.conftest import open_gates, tiny_model, tiny_tokenizer
from tests.core.comparison import TOKENS, logits_of, relative, squared_error

# An FFN that is a module, one that is in its decoder layer directly, one with transposed weights.
KINDS = ["llama", "opt", "gpt2"]


def training_pass(model, adapter, call=None):
    """Logits and gradients of a scalar of them in train mode; `call` replaces the call of the model."""
    model.train()
    torch.manual_seed(7)  # of dropout
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    out = (model if call is None else call)(TOKENS.to(input_device(model)), use_cache=False).logits
    out.logsumexp(-1).square().mean().backward()
    model.eval()
    return out.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters()}


def assert_same_gradients(found, expected, tolerance):
    """Compare projections one by one and gates together: the gradient of one gate can nearly cancel."""
    gates = [name for name in expected if name.endswith("gate")]
    assert relative(*(torch.cat([gradients[name] for name in gates]) for gradients in (found, expected))) < tolerance
    for name in expected.keys() - set(gates):
        assert float(expected[name].abs().max()) > 0, name
        assert relative(found[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_no_gradient(name, device):
    """The second forward pass gives the same factors as the first."""
    model = tiny_model(name).to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    out, expected = training_pass(model, adapter)
    calls = []
    adapter.adapted_ffns[0][1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again, found = training_pass(model, adapter)
    assert len(calls) == 2
    assert relative(again, out) < 1e-6
    assert_same_gradients(found, expected, 1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_both_attention_paths_give_the_same_gradients(name, device):
    """SDPA and eager, in float64, where the two attentions agree."""
    results = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(name, torch.float64, attn_implementation=attention, dropout=0.0, **_no_dropout(name)).to(
            device
        )
        assert model.config._attn_implementation == attention
        adapter = attach(model, 4)
        for _, adapter_layer in adapter.adapted_ffns:
            adapter_layer.double()
        open_gates(adapter)
        results.append(training_pass(model, adapter))
    assert relative(results[0][0], results[1][0]) < 1e-6
    assert_same_gradients(results[0][1], results[1][1], 1e-6)


def _no_dropout(name):
    return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}


@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_model_is_one_graph_and_follows_every_change(name, device):
    """Logits of inference, also after a parameter changed and after the projection was materialised."""
    torch._dynamo.reset()
    model = tiny_model(name, num_hidden_layers=1).to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = logits_of(model)
    assert relative(logits_of(compiled), first) < 1e-6
    with torch.no_grad():
        adapter.adapted_ffns[0][1].gate.add_(1.0)
    second = logits_of(model)
    assert relative(second, first) > 1e-4
    assert relative(logits_of(compiled), second) < 1e-6
    # Now R is `weight`; the graph reads that when it runs.
    adapter.tensors()
    assert relative(logits_of(compiled), logits_of(model)) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_training_step_has_the_same_gradients(name, device):
    """Forward and backward as one graph."""
    torch._dynamo.reset()
    dropout = _no_dropout(name) | ({"dropout": 0.0} if name == "opt" else {})
    model = tiny_model(name, num_hidden_layers=1, **dropout).to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    out, expected = training_pass(model, adapter)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again, found = training_pass(model, adapter, compiled)
    assert relative(again, out) < 1e-6
    assert_same_gradients(found, expected, 2e-5)
    with torch.no_grad():
        adapter.adapted_ffns[0][1].weight.mul_(1.5).add_(0.05)
    out, expected = training_pass(model, adapter)
    again, found = training_pass(model, adapter, compiled)
    assert relative(again, out) < 1e-6
    assert_same_gradients(found, expected, 2e-5)


def test_the_operator_passes_opcheck():
    """No aliasing; shapes and strides as registered."""
    model = tiny_model()
    adapter = attach(model, 4)
    ffn, adapter_layer = adapter.adapted_ffns[0]
    for parameter in adapter_layer.parameters():
        parameter.requires_grad_(False)
    args = ([*adapter_layer.parameters()], ffn.values(), adapter_layer._handle, torch.bfloat16)
    results = torch.library.opcheck(_cached_factors, args)
    assert set(results.values()) == {"SUCCESS"}


def test_a_compiled_graph_distinguishes_a_module_from_its_copy():
    """A deep copy has another handle."""
    adapter = attach(tiny_model(), 4)
    ffn, adapter_layer = adapter.adapted_ffns[0]
    duplicate = copy.deepcopy(adapter_layer)
    compiled = torch.compile(lambda module: module.factors(ffn.values(), torch.float32), backend="eager")
    with torch.no_grad():
        duplicate.gate.add_(2.0)
        assert torch.equal(compiled(duplicate)[1], duplicate.factors(ffn.values(), torch.float32)[1])
        assert not torch.equal(compiled(duplicate)[1], adapter_layer.factors(ffn.values(), torch.float32)[1])


@pytest.fixture(scope="module", params=KINDS)
def stored(request, tmp_path_factory):
    """Folder of a tiny model, its logits and gradients with an adapter, and samples of its value matrices."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base = load_base(str(folder), LoadOptions(device="cpu"))
    adapter = attach(base.model, 4)
    open_gates(adapter)
    return folder, logits_of(base.model), training_pass(base.model, adapter), base.samples


def _last_layer_on_disk(model):
    """Device map with the last decoder layer on disk and the rest on the CPU."""
    last = find_ffns(model)[-1].path.split(".")
    layer = next(".".join(last[: i + 1]) for i, part in enumerate(last) if part.isdigit())
    names = [n for n, m in model.named_modules() if n and not layer.startswith(f"{n}.") and not list(m.children())]
    inside = [n for n in names if n.startswith(f"{layer}.")]
    return {**{n: "cpu" for n in names if n not in inside}, layer: "disk"}


@pytest.mark.parametrize("where", ["auto", "cpu", "last layer on disk", "all on disk"])
def test_an_offloaded_base_is_bit_identical(stored, tmp_path, where):
    """Logits, gradients and samples with weights that accelerate loads from disk for each product."""
    from transformers import AutoModelForCausalLM

    folder, expected, (_, gradients), samples = stored
    device_map = {"auto": "auto", "cpu": {"": "cpu"}}.get(where)
    if device_map is None:
        device_map = _last_layer_on_disk(AutoModelForCausalLM.from_pretrained(folder))
        if where == "all on disk":
            device_map = dict.fromkeys(device_map, "disk")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path).eval()
    ffns = find_ffns(model)
    assert isinstance(ffns[-1].values(), StoredValues) == ("disk" in where)
    assert torch.equal(torch.stack([ffn.samples for ffn in ffns]), samples)
    assert input_device(model).type == "cpu"
    adapter = attach(model, 4)
    open_gates(adapter)
    assert torch.equal(logits_of(model), expected)
    assert_same_gradients(training_pass(model, adapter)[1], gradients, 1e-6)
    with reference(adapter):
        assert relative(expected, logits_of(model)) < 1e-5


def test_a_layer_on_another_device_gives_the_same_logits_and_gradients(stored, device):
    """The last decoder layer is on the CPU, all others on the device."""
    from transformers import AutoModelForCausalLM

    folder, expected, (_, gradients), _ = stored
    inside = dict.fromkeys(_last_layer_on_disk(AutoModelForCausalLM.from_pretrained(folder)), str(device))
    last = list(_last_layer_on_disk(AutoModelForCausalLM.from_pretrained(folder)))[-1]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={**inside, last: "cpu"}).eval()
    adapter = attach(model, 4)
    open_gates(adapter)
    assert relative(logits_of(model).cpu(), expected) < 1e-5
    found = {name: gradient.cpu() for name, gradient in training_pass(model, adapter)[1].items()}
    assert_same_gradients(found, gradients, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_gives_the_gradients_of_eager_attention(device, dtype):
    """At most twice the error of eager attention against float32."""
    pytest.importorskip("flash_attn", reason="NOT TESTED WITH FLASHATTENTION: it is not installed")
    if device.type != "cuda":
        pytest.skip("NOT TESTED WITH FLASHATTENTION: it needs a GPU")
    found = {}
    for attention, kind in (("eager", torch.float32), ("eager", dtype), ("flash_attention_2", dtype)):
        model = tiny_model("llama", dtype, attn_implementation=attention).to(kind).to(device)
        adapter = attach(model, 4)
        open_gates(adapter)
        out, gradients = training_pass(model, adapter)
        found[attention, kind] = torch.cat([out.float().flatten(), *(g.flatten() for g in gradients.values())])
    truth = found["eager", torch.float32]
    ours, plain = (squared_error(found[name, dtype], truth) for name in ("flash_attention_2", "eager"))
    assert ours**0.5 <= 2 * plain**0.5
