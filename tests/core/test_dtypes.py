"""Where and how a base may run: dtypes, compiled, checkpointed, either attention, spread over devices and disk."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file

from braces_cli.core.adapter.files import WEIGHTS_FILE, find_adapter
from braces_cli.core.adapter.layer import _cached_factors, projection_error
from braces_cli.core.adapter.model import attach, attach_stored
from braces_cli.core.adapter.reference import reference
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.identity import fingerprint
from braces_cli.core.models.load import input_device, load_base
from braces_cli.core.models.weights import StoredValues
from braces_cli.core.options import LoadOptions
from tests.conftest import make_adapter, open_gates, tiny_model, tiny_tokenizer
from tests.core.method.test_reference import TOKENS, relative, run, squared_error

# One FFN that is a module of its own, one that lies loose in its layer, one whose weights are stored transposed.
KINDS = ["llama", "opt", "gpt2"]


def logits(model):
    with torch.no_grad():
        return model(TOKENS.to(input_device(model)), use_cache=False).logits


def training_pass(model, adapter, call=None):
    """Logits and gradients of a scalar of them, in train mode, through `call` in place of the model."""
    model.train()
    torch.manual_seed(7)  # of dropout
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    out = (model if call is None else call)(TOKENS.to(input_device(model)), use_cache=False).logits
    out.logsumexp(-1).square().mean().backward()
    model.eval()
    return out.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters()}


def assert_same_gradients(found, expected, tolerance):
    """Projections one by one, gates together: one gate's gradient is a single number, which may nearly cancel."""
    gates = [name for name in expected if name.endswith("gate")]
    assert relative(*(torch.cat([gradients[name] for name in gates]) for gradients in (found, expected))) < tolerance
    for name in expected.keys() - set(gates):
        assert float(expected[name].abs().max()) > 0, name
        assert relative(found[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("name", KINDS)
def test_float16_is_no_worse_than_twice_the_references_own_error(name, device):
    """Held to the float32 model with the same (rounded) weights."""
    ours: dict[str, float] = defaultdict(float)
    plain: dict[str, float] = defaultdict(float)
    for seed in range(4):
        model = tiny_model(name, torch.float16, seed).to(device)
        adapter = attach(model, 4)
        open_gates(adapter, seed)
        fast, fast_grads = run(model, adapter, False)
        slow, slow_grads = run(model, adapter, True)
        assert fast.dtype == torch.float16
        assert all(adapter_layer.weight.dtype == torch.float32 for _, adapter_layer in adapter.adapted_ffns)
        model.float()
        truth, true_grads = run(model, adapter, True)
        for found, errors in ((fast, ours), (slow, plain)):
            errors["logits"] += squared_error(found, truth)
        for key in (key for key in true_grads if key.endswith("weight")):
            ours["weight"] += squared_error(fast_grads[key], true_grads[key])
            plain["weight"] += squared_error(slow_grads[key], true_grads[key])
    for kind, error in ours.items():
        assert 0 < error**0.5 <= 2 * plain[kind] ** 0.5, kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_adapter_is_saved_and_loaded_bit_for_bit_with_orthonormal_rows(session, tmp_path, dtype, device):
    """Optimizer steps on a 16-bit base, then a file, then the same bits on a base loaded afresh."""
    folder = make_adapter(session, tmp_path / "adapter")
    base = load_base(session.base.name, LoadOptions(device=str(device), dtype=str(dtype).removeprefix("torch.")))
    model = base.model
    stored = find_adapter(str(folder))
    adapter, config = attach_stored(base, stored), stored.config
    for _, parameter in adapter.named_parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=0.05)
    for _ in range(3):
        training_pass(model, adapter)
        optimizer.step()
    adapter.save(folder, config, "# test\n")
    expected = logits(model)
    saved = load_file(folder / WEIGHTS_FILE)
    errors = [projection_error(tensor) for name, tensor in saved.items() if name.endswith("projection")]
    assert len(errors) == 2
    assert max(errors) < 1e-5
    again = load_base(session.base.name, LoadOptions(device=str(device), dtype=str(dtype).removeprefix("torch.")))
    attach_stored(again, find_adapter(str(folder)))
    assert torch.equal(logits(again.model), expected)


def test_the_projection_is_float32_under_autocast():
    """Training in mixed precision rounds the base's products, never R."""
    model = tiny_model()
    adapter = attach(model, 4)
    open_gates(adapter)
    adapter_layer = adapter.adapted_ffns[0][1]
    plain = adapter_layer.projection()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter_layer.projection(), plain)
        down, up = adapter_layer.factors(adapter.adapted_ffns[0][0].values(), torch.float32)
    assert torch.equal(down, plain)
    assert torch.equal(up, adapter_layer.factors(adapter.adapted_ffns[0][0].values(), torch.float32)[1])


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_tied_embeddings_stay_tied_and_untouched(name):
    """Attaching, a training step and detaching change no bit of them."""
    model = tiny_model(name, tie_word_embeddings=True)
    shared = model.get_input_embeddings().weight
    before = shared.detach().clone()
    adapter = attach(model, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    training_pass(model, adapter)
    optimizer.step()
    adapter.detach()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is shared
    assert torch.equal(shared, before)


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
    assert len(calls) == 2  # it was in force
    assert relative(again, out) < 1e-6
    assert_same_gradients(found, expected, 1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_both_attention_paths_give_the_same_gradients(name, device):
    """SDPA and eager; in float64, where the two attentions themselves do not differ."""
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
    """Inference: the logits of the model as it is, also after a parameter changed, and after loading another W_V."""
    torch._dynamo.reset()
    model = tiny_model(name).to(device)
    adapter = attach(model, 4)
    open_gates(adapter)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = logits(model)
    assert relative(logits(compiled), first) < 1e-6
    with torch.no_grad():
        adapter.adapted_ffns[0][1].gate.add_(1.0)
    second = logits(model)
    assert relative(second, first) > 1e-4
    assert relative(logits(compiled), second) < 1e-6
    # From here on R is `weight` itself: that, too, is found out when the graph runs.
    adapter.tensors()
    assert relative(logits(compiled), logits(model)) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_training_step_has_the_same_gradients(name, device):
    """Forward and backward, again as one graph."""
    torch._dynamo.reset()
    model = tiny_model(name, **_no_dropout(name), **({"dropout": 0.0} if name == "opt" else {})).to(device)
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


def test_the_operator_keeps_the_compilers_rules():
    """No aliasing, shapes and strides as announced."""
    model = tiny_model()
    adapter = attach(model, 4)
    ffn, adapter_layer = adapter.adapted_ffns[0]
    for parameter in adapter_layer.parameters():
        parameter.requires_grad_(False)
    args = ([*adapter_layer.parameters()], ffn.values(), adapter_layer._handle, torch.bfloat16)
    results = torch.library.opcheck(_cached_factors, args)
    assert set(results.values()) == {"SUCCESS"}


def test_a_copied_module_answers_for_itself_in_a_compiled_graph():
    """A graph finds its module by a number; a deep copy has another."""
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
    """A tiny model in files: its name there, and what it computes with an adapter on it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base = load_base(str(folder), LoadOptions(device="cpu"))
    adapter = attach(base.model, 4)
    open_gates(adapter)
    return folder, logits(base.model), training_pass(base.model, adapter), base.fingerprint


def _last_layer_on_disk(model):
    """A device map: all on the CPU but the value projection's layer of the last FFN."""
    last = find_ffns(model)[-1].path.split(".")
    layer = next(".".join(last[: i + 1]) for i, part in enumerate(last) if part.isdigit())
    names = [n for n, m in model.named_modules() if n and not layer.startswith(f"{n}.") and not list(m.children())]
    inside = [n for n in names if n.startswith(f"{layer}.")]
    return {**{n: "cpu" for n in names if n not in inside}, layer: "disk"}


@pytest.mark.parametrize("where", ["auto", "cpu", "last layer on disk", "all on disk"])
def test_a_spread_out_base_gives_the_same_bits(stored, tmp_path, where):
    """A weight that accelerate keeps on disk is fetched for each product with it: logits, gradients, fingerprint."""
    from transformers import AutoModelForCausalLM

    folder, expected, (_, gradients), print_ = stored
    device_map = {"auto": "auto", "cpu": {"": "cpu"}}.get(where)
    if device_map is None:
        device_map = _last_layer_on_disk(AutoModelForCausalLM.from_pretrained(folder))
        if where == "all on disk":
            device_map = dict.fromkeys(device_map, "disk")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path).eval()
    ffns = find_ffns(model)
    assert isinstance(ffns[-1].values(), StoredValues) == ("disk" in where)
    assert fingerprint(model, ffns, folder) == print_
    assert fingerprint(model, ffns, None)["sha256"] == _hash_of_weights(folder)
    assert input_device(model).type == "cpu"
    adapter = attach(model, 4)
    open_gates(adapter)
    assert torch.equal(logits(model), expected)
    assert_same_gradients(training_pass(model, adapter)[1], gradients, 1e-6)
    with reference(adapter):
        assert relative(expected, logits(model)) < 1e-5


def test_a_layer_on_another_device_gives_the_same_logits_and_gradients(stored, device):
    """The last decoder layer on the CPU, all others on the device; on a CPU both are one."""
    from transformers import AutoModelForCausalLM

    folder, expected, (_, gradients), _ = stored
    inside = dict.fromkeys(_last_layer_on_disk(AutoModelForCausalLM.from_pretrained(folder)), str(device))
    last = list(_last_layer_on_disk(AutoModelForCausalLM.from_pretrained(folder)))[-1]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={**inside, last: "cpu"}).eval()
    adapter = attach(model, 4)
    open_gates(adapter)
    assert relative(logits(model).cpu(), expected) < 1e-5
    found = {name: gradient.cpu() for name, gradient in training_pass(model, adapter)[1].items()}
    assert_same_gradients(found, gradients, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_gives_the_gradients_of_eager_attention(device, dtype):
    """No worse than twice what eager attention itself differs by from float32."""
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


def _hash_of_weights(folder):
    model = load_base(str(folder), LoadOptions(device="cpu")).model
    return fingerprint(model, find_ffns(model), None)["sha256"]
