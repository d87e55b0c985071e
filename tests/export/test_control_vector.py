"""The GGUF control vector, added to the output of a layer as repeng does, has the logits of braces' steering."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.vector import with_steered_layers
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.load import Base
from braces_cli.export.control_vector import export_control_vector
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer
from tests.core.architectures import tiny
from tests.core.comparison import relative
from tests.export.models import logits, with_adapter

gguf = pytest.importorskip("gguf", reason="NOT TESTED: the export needs the package gguf")


def opened(model: Any) -> Session:
    return Session(Base(model, tiny_tokenizer(), "tiny"))


def applied(model: Any, path: Path) -> torch.Tensor:
    """Logits with each `direction.{layer}` added to the output of that decoder layer."""
    stack = layer_stack(model)[1]
    with ExitStack() as hooks:
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32

            direction = torch.tensor(tensor.data.copy())

            def add(module: Any, args: Any, output: Any, vector: Any = direction) -> Any:
                return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

            layer = stack[int(tensor.name.removeprefix("direction."))]
            hooks.callback(layer.register_forward_hook(add).remove)
        return logits(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi", "granite", "mixtral", "qwen3_moe"])
def test_an_exported_vector_steers_as_braces_does(name: str, tmp_path: Path) -> None:
    """Without training; the FFN or mixture joins the residual stream unchanged or times a constant."""
    model = tiny(name) if name in ("granite", "mixtral", "qwen3_moe") else tiny_model(name)
    if name == "granite":
        for layer in model.model.layers:
            layer.residual_multiplier = 0.22
    session = opened(model)
    terms = [(build_attribute(session, "positive", ["good", "happy"]), 3.0)]
    bare = logits(model)
    with steered(session, terms, [1]):
        expected = logits(model)
    assert relative(bare, expected) > 1e-3, "steering has no effect"
    found = export_control_vector(session, terms, [1], tmp_path / "v.gguf")
    assert found["layers"] == [1]
    assert relative(applied(model, tmp_path / "v.gguf"), expected) < 1e-5


def test_with_an_adapter_the_vector_has_the_steering_and_not_the_side_path(session: Any, tmp_path: Path) -> None:
    """Added to the unsteered adapter, it gives the steered adapter."""
    adapter_dir = make_adapter(session, tmp_path / "adapter")
    terms = [(build_attribute(session, "positive", ["good", "happy"]), 2.0)]
    session.add_adapter(find_adapter(str(adapter_dir)))
    with steered(session, terms, [1]):
        expected = logits(session.base.model)
    export_control_vector(session, terms, [1], tmp_path / "v.gguf")
    assert relative(logits(session.base.model), expected) > 1e-3
    assert relative(applied(session.base.model, tmp_path / "v.gguf"), expected) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "bert"])
def test_an_architecture_without_an_equal_vector_is_refused(name: str, tmp_path: Path) -> None:
    """Norms after the FFN, norms after the sum; nothing is written."""
    session = opened(tiny(name))
    terms = [(build_attribute(session, "positive", ["good", "happy"]), 2.0)]
    with pytest.raises(ModelError, match="no control vector steers") as caught:
        export_control_vector(session, terms, [1], tmp_path / "v.gguf")
    assert "braces merge" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_an_attribute_through_experts_is_refused_and_a_steering_vector_is_not(tmp_path: Path) -> None:
    """The first depends on the router; the second is added after the mixture, with an adapter or without."""
    session = opened(tiny("mixtral"))
    through = build_attribute(session, "positive", ["good", "happy"])
    direction = torch.randn(through.state.shape, generator=torch.Generator().manual_seed(0))
    vector = replace(through, direction=direction)
    session.adapter = with_adapter(session.base.model)
    with pytest.raises(ModelError, match="layer 1 depends on the router") as caught:
        export_control_vector(session, [(vector, 2.0), (through, 2.0)], [1], tmp_path / "v.gguf")
    assert "merge" not in caught.value.hint, "a mixture cannot be merged either"
    assert not list(tmp_path.iterdir())
    with steered(session, [(vector, 2.0)], [1]):
        expected = logits(session.base.model)
    export_control_vector(session, [(vector, 2.0)], [1], tmp_path / "v.gguf")
    assert relative(logits(session.base.model), expected) > 1e-3
    assert relative(applied(session.base.model, tmp_path / "v.gguf"), expected) < 1e-5


def test_layer_0_alone_and_no_steering_are_refused(session: Any, tmp_path: Path) -> None:
    """llama.cpp does not read `direction.0`. A strength of 0 gives no vector."""
    attribute = build_attribute(session, "positive", ["good"])
    with pytest.raises(ConfigError, match="layer 0\nAdd --layers 1-;"):
        export_control_vector(session, [(attribute, 1.0)], [0], tmp_path / "v.gguf")
    with pytest.raises(ConfigError, match="nothing is steered"):
        export_control_vector(session, [(attribute, 0.0)], [1], tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_layer_0_is_left_out_and_the_others_carry_its_share(session: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The file steers as layer 1 alone at the strength with the same total; a wrong file is refused."""
    attribute = with_steered_layers(build_attribute(session, "positive", ["good", "happy"]), [0, 1])
    # At s = 1 both layers have the same share.
    with steered(session, [(attribute, 6.0)], [1]):
        expected = logits(session.base.model)
    found = export_control_vector(session, [(attribute, 3.0)], None, tmp_path / "v.gguf")
    assert (found["layers"], found["left_out"], found["scaled_by"]) == ([1], [0], pytest.approx(2, rel=1e-4))
    assert relative(applied(session.base.model, tmp_path / "v.gguf"), expected) < 1e-5
    assert found["max_logit_difference"] <= 4 * found["rounding"]
    monkeypatch.setattr("braces_cli.export.control_vector.residual_factors", lambda *_: [1.01])
    with pytest.raises(ModelError, match="does not match"):
        export_control_vector(session, [(attribute, 3.0)], None, tmp_path / "w.gguf")
    assert not (tmp_path / "w.gguf").exists()


def test_the_command_writes_a_file(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    """One document on stdout; an existing file is not replaced."""
    file = tmp_path / "v.gguf"
    steer = ("--model", model_dir, "--attribute", "positive", "--s", 2, "--layers", "0-")
    call = ("export", "control-vector", *steer, "--output", file, "--format", "json")
    done = braces(*call)
    assert done.code == 0, done.err
    assert (done.json["layers"], done.json["left_out"]) == ([1], [0])
    assert "layer 0 is left out" in done.err
    assert done.json["attributes"] == {"positive": 2.0}
    fields = gguf.GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "controlvector"
    assert fields["controlvector.model_hint"].contents() == "llama"
    assert braces(*call).code == 2
