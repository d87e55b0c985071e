"""A checkpoint with its modelling file: the adapter's logits in plain transformers."""

import ast
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from braces_cli.core.adapter.model import attach, open_session
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.core.options import LoadOptions
from braces_cli.export.code import CODE_FILE, SideModule, side_modules, write_checkpoint_with_code
from tests.conftest import make_adapter, tiny_model
from tests.core.comparison import relative
from tests.export.conftest import save_base
from tests.export.models import MODELS, SHIFT, TOKENS, greedy, logits, names, with_adapter

BASES = (
    "qwen3", "gemma3_text", "mistral with a window", "phi3 with a window", "qwen3_moe", "gpt_oss", "llama4_text",
    "bloom", "gpt_neox",
)  # fmt: skip


def written(
    model: Any, folder: Path, shift: torch.Tensor | None = SHIFT, steering_vector: Any = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the base with an adapter into `folder/code`; returns logits and greedy tokens of the adapter."""
    model.save_pretrained(folder / "base")
    adapter = with_adapter(model, shift, **options)
    steering = {} if steering_vector is None else {ffn.layer: steering_vector for ffn, _ in adapter.adapted_ffns}
    hooks = [
        ffn.value.register_forward_hook(lambda module, args, output: output + steering_vector)
        for ffn, _ in adapter.adapted_ffns
        if steering_vector is not None and isinstance(ffn, FFN)
    ]
    expected = logits(model), greedy(model)
    sides = side_modules(adapter, steering)
    adapter.detach()
    for hook in hooks:
        hook.remove()
    write_checkpoint_with_code(folder / "code", model, sides, folder / "base")
    return expected


def load(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    model, info = kind.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "mismatched_keys"))
    return model.eval()


def value_parameters(model: Any) -> list[list[str]]:
    """Parameters of the value projections found by braces, layer by layer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ffns = find_ffns(model)
    values = [[part.value if isinstance(part, FFN) else part.module for part in ffn.parts] for ffn in ffns]
    return [sorted(names[p] for end in ends for p in end.parameters() if "braces" not in names[p]) for ends in values]


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["side path", "steered"])
@pytest.mark.parametrize("name", BASES)
def test_the_checkpoint_has_the_adapters_logits_and_tokens(name, shift, tmp_path):
    """float32: logits within 1e-5, equal greedy tokens, also after saving and loading again.

    braces finds the feed-forward layers of the base in the checkpoint, not the side paths.
    """
    model = MODELS[name]()
    bare, parameters = logits(model), value_parameters(model)
    expected, text = written(model, tmp_path, shift)
    assert relative(bare, expected) > 1e-2, "the adapter has no effect"
    loaded = load(tmp_path / "code")
    assert relative(logits(loaded), expected) < 1e-5
    assert torch.equal(greedy(loaded), text)
    assert value_parameters(loaded) == parameters
    if name == "qwen3":
        loaded.save_pretrained(tmp_path / "again")
        assert relative(logits(load(tmp_path / "again")), expected) < 1e-5


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["steering vector", "with a shift"])
@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_a_steering_vector_is_written_with_the_adapter(name: str, shift: torch.Tensor | None, tmp_path: Path) -> None:
    steering_vector = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    expected, _ = written(MODELS[name](), tmp_path, shift, steering_vector=steering_vector)
    assert relative(logits(load(tmp_path / "code")), expected) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_relevance_to_the_output_is_written(name: str, tmp_path: Path) -> None:
    """Subclassed and by hooks; refused for experts in one weight."""
    expected, _ = written(MODELS[name](), tmp_path, relevance_to="output")
    assert relative(logits(load(tmp_path / "code")), expected) < 1e-5
    with pytest.raises(ModelError, match="experts in one weight") as caught:
        side_modules(attach(MODELS["qwen3_moe"](), 4, relevance_to="output"))
    assert "braces merge" in str(caught.value.hint)


def test_a_steering_vector_without_a_side_path_is_refused(tmp_path: Path) -> None:
    """After a mixture of experts, and in a layer without an adapter."""
    steering_vector = torch.ones(32)
    with pytest.raises(ConfigError, match="layer 0 is steered"):
        written(MODELS["qwen3_moe"](), tmp_path, None, steering_vector=steering_vector)
    adapter = attach(MODELS["qwen3"](), 4, [1])
    with pytest.raises(ConfigError, match="layer 0 is steered"):
        side_modules(adapter, {0: steering_vector, 1: steering_vector})
    assert side_modules(adapter, {1: steering_vector})[0].entry["constant"]


def test_files_of_the_base_are_linked(tmp_path: Path) -> None:
    """One weight file or several; the modelling file imports only torch and transformers."""
    model = tiny_model("qwen3")
    written(model, tmp_path / "one")
    base, code = tmp_path / "one" / "base", tmp_path / "one" / "code"
    assert (code / "model-base.safetensors").samefile(base / "model.safetensors")
    side = load_file(code / "model-braces.safetensors")
    assert sorted({name.rpartition(".braces_")[2] for name in side}) == ["in.weight", "out.bias", "out.weight"]
    tree = ast.parse((code / CODE_FILE).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(module).partition(".")[0] for module in imported} == {"torch", "transformers"}
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    adapter = with_adapter(model)
    expected, sides = logits(model), side_modules(adapter)
    adapter.detach()
    write_checkpoint_with_code(tmp_path / "sharded", model, sides, tmp_path / "many")
    assert relative(logits(load(tmp_path / "sharded")), expected) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_a_copy_of_the_model_is_independent(name: str, tmp_path: Path) -> None:
    """Hooks of a copy use the copy's side path."""
    expected, _ = written(MODELS[name](), tmp_path)
    loaded = load(tmp_path / "code")
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        for parameter_name, parameter in loaded.named_parameters():
            if "braces_" in parameter_name:
                parameter.zero_()
    assert relative(logits(other), expected) < 1e-5
    assert relative(logits(loaded), expected) > 1e-2


def test_the_model_without_its_head_has_the_side_path(tmp_path: Path) -> None:
    """As servers load it: AutoModel, whose names lack the prefix of the causal model."""
    model = tiny_model("qwen3")
    written(model, tmp_path)
    whole, body = load(tmp_path / "code"), load(tmp_path / "code", AutoModel)
    assert type(body).__name__ == "BracesQwen3Model"
    with torch.no_grad():
        expected = whole.model(input_ids=TOKENS).last_hidden_state
        assert torch.equal(body(input_ids=TOKENS).last_hidden_state, expected)


def test_servers_that_replace_modules_are_not_supported(tmp_path: Path) -> None:
    """With a side path of experts, or hooks on two modules, the class supports no attention backend."""
    for name, supported in (("qwen3", True), ("bloom", False), ("qwen3_moe", False)):
        written(MODELS[name](), tmp_path / name)
        assert load(tmp_path / name / "code")._supports_attention_backend is supported


def test_the_command_writes_a_verified_folder(braces, tmp_path, monkeypatch, in_process):
    """With an attribute at a fixed strength; a wrong side path fails the verification and leaves nothing."""
    session = open_session(save_base(tmp_path / "base", "qwen3"), None, LoadOptions(device="cpu"))
    adapter = make_adapter(session, tmp_path / "adapter")
    call = ("export", "code", "--adapter", adapter, "--attribute", "positive", "--s", 2, "--format", "json")
    done = braces(*call, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["architecture"] == "BracesQwen3ForCausalLM"
    assert done.json["max_logit_difference"] < 1e-4 < done.json["adapter_effect"]
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()

    def halved(*args: Any) -> list[SideModule]:
        sides = side_modules(*args)
        for side in sides:
            side.tensors[f"{side.path}.braces_out.weight"] /= 2
        return sides

    monkeypatch.setattr("braces_cli.export.code.side_modules", halved)
    done = braces(*call, "--output-dir", tmp_path / "wrong")
    assert done.code == 4
    assert "its logits differ" in done.err
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_weights_that_are_unpacked_while_loading_are_saved_again(tmp_path: Path) -> None:
    """FP8 in blocks, which transformers unpacks without a GPU."""
    base, blocks = tmp_path / "base", {}
    tiny_model("qwen3", torch.bfloat16, hidden_size=128, intermediate_size=256, head_dim=64).save_pretrained(base)
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts = weight.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            scale = parts.abs().amax(dim=(1, 3), keepdim=True) / 448
            weight = (parts / scale).flatten(0, 1).flatten(1).to(torch.float8_e4m3fn)
            blocks[f"{name}_scale_inv"] = scale.reshape(scale.shape[0], -1)
        blocks[name] = weight
    save_file(blocks, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    packing = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": packing}))
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = with_adapter(model, SHIFT)
    expected, sides = logits(model), side_modules(adapter)
    adapter.detach()
    write_checkpoint_with_code(tmp_path / "code", model, sides, base)
    assert relative(logits(load(tmp_path / "code")), expected) < 0.02 < relative(logits(model), expected)


def test_a_base_with_its_own_code_is_refused(tmp_path: Path) -> None:
    """The config can name only one modelling file."""
    model = tiny_model("qwen3")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    with pytest.raises(ModelError, match="brings its own code"):
        write_checkpoint_with_code(tmp_path, model, [], tmp_path)
