"""Attach, disable, detach, save and load an adapter."""

import pytest
import torch
from safetensors.torch import load_file

from braces_cli.core.adapter.files import WEIGHTS_FILE, find_adapter
from braces_cli.core.adapter.layer import RelevanceModule, projection_error
from braces_cli.core.adapter.model import attach, attach_stored
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.load import load_base
from braces_cli.core.options import LoadOptions
from tests.conftest import ARCHITECTURES, make_adapter, open_gates, tiny_model
from tests.core.comparison import logits_of, run


@pytest.mark.parametrize(
    ("name", "relevance"), [*((name, "input") for name in ARCHITECTURES), ("llama", "output"), ("opt", "output")]
)
def test_disabled_and_detached_models_are_the_base(name, relevance):
    """Bit-identical logits; after detaching also the same names and flags, and no hooks."""
    model = tiny_model(name)
    names = [n for n, _ in model.named_parameters()]
    modules = [n for n, _ in model.named_modules()]
    base = logits_of(model)
    adapter = attach(model, 4, relevance_to=relevance)
    open_gates(adapter)
    on = logits_of(model)
    assert not torch.allclose(on, base)
    with adapter.disabled():
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model), on)
    assert [n for n, p in model.named_parameters() if "relevance" not in n] == names
    assert all(p.requires_grad == ("relevance" in n) for n, p in model.named_parameters())
    assert adapter.detach() is model
    assert torch.equal(logits_of(model), base)
    assert [n for n, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_starts_near_the_base_with_projections_and_gates_only():
    """g = sigmoid(-5); layers * (d_r d + 1) trained parameters."""
    model = tiny_model()
    base = logits_of(model)
    adapter = attach(model, 4)
    assert 0 < float((logits_of(model) - base).abs().max()) < 0.05 * float(base.abs().max())
    assert {p for p in model.parameters() if p.requires_grad} == {p for _, p in adapter.named_parameters()}
    assert sum(p.numel() for _, p in adapter.named_parameters()) == 2 * (4 * 32 + 1)


@pytest.mark.parametrize("relevance", ["input", "output"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_trained_adapter_is_bit_identical_after_saving_and_loading(session, tmp_path, dtype, relevance, device):
    """Optimizer steps, then a file with orthonormal rows, then the same logits on a newly loaded base."""
    folder = make_adapter(session, tmp_path / "adapter", relevance_to=relevance)
    options = LoadOptions(device=str(device), dtype=dtype)
    base, stored = load_base(session.base.name, options), find_adapter(str(folder))
    assert stored.config.relevance_to == relevance
    adapter = attach_stored(base, stored)
    assert adapter.relevance_to == relevance
    assert all(adapter_layer.weight.dtype == torch.float32 for _, adapter_layer in adapter.adapted_ffns)
    # torch multiplies single tokens with a frozen head at ten times the cost.
    assert all(p.requires_grad == ("relevance" not in name) for name, p in base.model.named_parameters())
    for _, parameter in adapter.named_parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=0.05)
    for _ in range(3):
        run(base.model, adapter, False)
        optimizer.step()
    adapter.save(folder, stored.config, "# test\n")
    expected = logits_of(base.model)
    saved = load_file(folder / WEIGHTS_FILE)
    errors = [projection_error(tensor) for name, tensor in saved.items() if name.endswith("projection")]
    assert len(errors) == (4 if relevance == "output" else 2)
    assert max(errors) < 1e-5
    again = load_base(session.base.name, options)
    attach_stored(again, find_adapter(str(folder)))
    assert torch.equal(logits_of(again.model), expected)


def test_states_are_computed_on_the_device_of_the_mlp():
    """With a device map the steered layer can be on another device; the device `meta` represents it."""
    adapter = attach(tiny_model(), 4)
    assert adapter.states(torch.zeros(3, 32)).device.type == "cpu"
    adapter.add_mlp().to("meta")
    assert adapter.states(torch.zeros(3, 32)).device.type == "meta"


def test_layers_ranks_and_second_adapters():
    """An adapter on one layer adds no module to others; ranks are 1 to d; a second adapter would hide the first."""
    model = tiny_model()
    for rank in (0, 33):
        with pytest.raises(ConfigError, match="does not fit hidden size 32"):
            attach(model, rank)
    assert attach(model, 4, layers=[1]).layers == [1]
    assert [n for n, m in model.named_modules() if isinstance(m, RelevanceModule)] == ["model.layers.1.mlp.relevance"]
    with pytest.raises(ModelError, match="already"):
        attach(model, 4)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_tied_embeddings_stay_tied_and_unchanged(name):
    """After attaching, a training step and detaching they are bit-identical."""
    model = tiny_model(name, tie_word_embeddings=True)
    shared = model.get_input_embeddings().weight
    before = shared.detach().clone()
    adapter = attach(model, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(model, adapter, False)
    optimizer.step()
    adapter.detach()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is shared
    assert torch.equal(shared, before)
