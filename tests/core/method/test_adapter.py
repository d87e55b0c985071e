"""The laws of an adapter: attach, switch off, detach, save, load."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from braces_cli.core.adapter.files import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_config
from braces_cli.core.adapter.layer import RelevanceModule, projection_error
from braces_cli.core.adapter.model import attach, attach_stored
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.load import Base
from tests.conftest import ARCHITECTURES, make_adapter, open_gates, tiny_model

TOKENS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_off_is_the_base_and_detached_is_the_very_same_model(name):
    """Disabled: bit for bit the base. Detached: names, flags and logits as before."""
    model = tiny_model(name)
    names = [n for n, _ in model.named_parameters()]
    modules = [n for n, _ in model.named_modules()]
    base = logits(model)
    adapter = attach(model, 4)
    open_gates(adapter)
    on = logits(model)
    assert not torch.allclose(on, base)
    with adapter.disabled():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)
    assert [n for n, p in model.named_parameters() if "relevance" not in n] == names
    assert all(p.requires_grad == ("relevance" in n) for n, p in model.named_parameters())
    assert adapter.detach() is model
    assert torch.equal(logits(model), base)
    assert [n for n, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_starts_at_the_base():
    """g = sigmoid(-5): the first output is near the base's, not at it."""
    model = tiny_model()
    base = logits(model)
    attach(model, 4)
    assert 0 < float((logits(model) - base).abs().max()) < 0.05 * float(base.abs().max())


def test_only_projections_and_gates_train():
    """layers * (d_r d + 1) parameters."""
    model = tiny_model()
    adapter = attach(model, 4)
    assert adapter.parameter_count() == 2 * (4 * 32 + 1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.parameter_count()


def test_saved_and_loaded_gives_the_same_bits(session, tmp_path):
    """After saving, the model in memory and a loaded one have bit-identical logits."""
    model = session.base.model
    folder = make_adapter(session, tmp_path / "a")
    adapter = attach_stored(session.base, find_adapter(str(folder)))
    with torch.no_grad():
        adapter.adapted_ffns[0][1].weight.mul_(1.1)
    adapter.save(folder, find_adapter(str(folder)).config, "")
    before = logits(model)
    adapter.detach()
    attach_stored(session.base, find_adapter(str(folder)))
    assert torch.equal(logits(model), before)


def test_bfloat16_base_saves_and_loads_the_same_bits_with_orthonormal_rows(session, tmp_path):
    """The projection stays in float32 whatever the base's dtype."""
    model = session.base.model.to(torch.bfloat16)
    folder = make_adapter(session, tmp_path / "a")
    adapter = attach_stored(session.base, find_adapter(str(folder)))
    first = logits(model)
    assert all(adapter_layer.weight.dtype == torch.float32 for _, adapter_layer in adapter.adapted_ffns)
    assert all(projection_error(adapter_layer.projection()) < 1e-5 for _, adapter_layer in adapter.adapted_ffns)
    adapter.detach()
    attach_stored(session.base, find_adapter(str(folder)))
    assert torch.equal(logits(model), first)


def test_casting_the_model_does_not_round_the_projection():
    """`model.to(bfloat16)` after attaching leaves our parameters as they were."""
    model = tiny_model()
    adapter = attach(model, 4)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    model.to(torch.bfloat16)
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())


def test_cached_factors_follow_every_change_of_a_parameter():
    """The cache of inference is never stale: in-place updates and loading both show."""
    model = tiny_model()
    adapter = attach(model, 4)
    first = logits(model)
    with torch.no_grad():
        adapter.adapted_ffns[0][1].gate.add_(3.0)
    second = logits(model)
    assert not torch.equal(first, second)
    adapter.adapted_ffns[0][1].weight.data.add_(0.5)  # unseen by version counters, as some optimizers write
    model.train()
    model.eval()
    assert not torch.equal(logits(model), second)


def test_states_are_computed_where_the_mlp_of_attributes_is():
    """Under a device map the layer that is steered may be elsewhere; the device without numbers stands for it."""
    adapter = attach(tiny_model(), 4)
    assert adapter.states(torch.zeros(3, 32)).device.type == "cpu"
    adapter.add_mlp().to("meta")
    assert adapter.states(torch.zeros(3, 32)).device.type == "meta"


def test_layers_can_be_chosen():
    """An adapter on one layer leaves the others bare."""
    model = tiny_model()
    adapter = attach(model, 4, layers=[1])
    assert adapter.layers == [1]
    assert [n for n, m in model.named_modules() if isinstance(m, RelevanceModule)] == ["model.layers.1.mlp.relevance"]


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_does_not_fit_is_refused(rank):
    """Rank 1 to d."""
    with pytest.raises(ConfigError, match="does not fit hidden size 32"):
        attach(tiny_model(), rank)


def test_two_adapters_at_once_are_refused():
    """The second would hide the first."""
    model = tiny_model()
    attach(model, 4)
    with pytest.raises(ModelError, match="already"):
        attach(model, 4)


def test_another_base_is_refused(session, adapter_dir):
    """Other weights of the same sizes, and other sizes, are named."""
    other = tiny_model("llama", seed=9)

    with pytest.raises(ModelError, match="same sizes, other weights"):
        attach_stored(Base(other, None, ""), find_adapter(str(adapter_dir)))
    wider = tiny_model("llama", intermediate_size=60)
    with pytest.raises(ModelError, match="value vectors: adapter 52, base 60"):
        attach_stored(Base(wider, None, ""), find_adapter(str(adapter_dir)))


def test_fingerprint_does_not_depend_on_the_dtype_loaded(model_dir):
    """It is read from the checkpoint's files."""
    from braces_cli.core.models.load import load_base
    from braces_cli.core.options import LoadOptions

    prints = [
        load_base(str(model_dir), LoadOptions(device="cpu", dtype=dtype)).fingerprint
        for dtype in ("float32", "bfloat16")
    ]
    assert prints[0] == prints[1]
    assert prints[0]["sha256"]


def _damage(tensors, how):
    first = "layers.0.projection"
    if how == "missing":
        del tensors[first]
    elif how == "extra":
        tensors["layers.9.gate"] = torch.zeros(1)
    elif how == "shape":
        tensors[first] = tensors[first][:2].clone()
    elif how == "dtype":
        tensors[first] = tensors[first].half()
    elif how == "nan":
        tensors["layers.0.gate"] = torch.full((1,), torch.nan)
    elif how == "rows":
        tensors[first] = tensors[first] * 1.001
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing tensor layers.0.projection"),
        ("extra", "unexpected tensor layers.9.gate"),
        ("shape", r"\(2, 32\)"),
        ("dtype", "float16"),
        ("nan", "not finite"),
        ("rows", "not orthonormal"),
    ],
)
def test_a_damaged_adapter_is_refused_by_the_tensor_at_fault(session, adapter_dir, how, message):
    """Strict on load."""
    path = adapter_dir / WEIGHTS_FILE
    save_file(_damage(load_file(path), how), path)
    with pytest.raises(ModelError, match=message):
        attach_stored(session.base, find_adapter(str(adapter_dir)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"method": "lora"}, r"not a braces adapter[^\n]*\n.*also accepts adapters of peft"),
        ({"colour": "red"}, "unknown key `colour`"),
        ({"r": None}, "required field r"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(adapter_dir, change, message):
    """Unknown keys are no better than missing ones."""
    path = adapter_dir / CONFIG_FILE
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ModelError, match=message):
        read_config(adapter_dir)


def test_a_truncated_weights_file_is_refused(session, adapter_dir):
    """No traceback of the reader reaches the user."""
    path = adapter_dir / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot read the adapter's weights"):
        attach_stored(session.base, find_adapter(str(adapter_dir)))
