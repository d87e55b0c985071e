"""A checkpoint with its modelling file: the adapter's numbers in plain transformers, of several versions."""

from __future__ import annotations

import ast
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from braces_cli.core.adapter.model import attach
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.export.code import CODE_FILE, side_paths, write_checkpoint_with_code
from tests.conftest import make_adapter, open_gates, tiny_model, tiny_tokenizer
from tests.core.architectures import tiny
from tests.core.invariants import relative
from tests.export.architecture_columns import SHIFT, frozen
from tests.export.test_merge import phi3

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
BASES: dict[str, Any] = {
    "qwen3": lambda: tiny_model("qwen3"),
    "gemma3_text": lambda: tiny("gemma3_text"),
    "mistral": lambda: tiny_model("mistral", sliding_window=8),
    "phi3": lambda: phi3(sliding_window=8),
    "qwen3_moe": lambda: tiny("qwen3_moe"),
    "gpt_oss": lambda: tiny("gpt_oss"),
    "llama4_text": lambda: tiny("llama4_text"),
    "bloom": lambda: tiny("bloom"),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
}
OLDER = ("5.16.1", "5.20.0")
# Loads a folder and writes the logits of fixed tokens; braces is not imported.
_PROGRAM = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__ == sys.argv[2], transformers.__version__
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
    with torch.no_grad():
        found[name] = model.eval()(input_ids=load_file(sys.argv[3])["tokens"], use_cache=False).logits.contiguous()
save_file(found, sys.argv[4])
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def greedy(model: Any) -> torch.Tensor:
    config = GenerationConfig(max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=1)
    with torch.no_grad():
        return model.generate(input_ids=TOKENS[:, :4], generation_config=config)


def written(
    model: Any, folder: Path, shift: torch.Tensor | None = SHIFT, steering_vector: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy tokens of the adapter on a base, which is written into `folder/code`."""
    model.save_pretrained(folder / "base")
    adapter = attach(model, 4)
    open_gates(adapter)
    frozen(adapter, shift)
    steering = {} if steering_vector is None else {ffn.layer: steering_vector for ffn, _ in adapter.adapted_ffns}
    hooks = [
        ffn.value.register_forward_hook(lambda module, args, output: output + steering_vector)
        for ffn, _ in adapter.adapted_ffns
        if steering_vector is not None and isinstance(ffn, FFN)
    ]
    expected = logits(model), greedy(model)
    sides = side_paths(adapter, steering)
    adapter.detach()
    for hook in hooks:
        hook.remove()
    write_checkpoint_with_code(folder / "code", model, sides, folder / "base")
    return expected


def load(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    model, info = kind.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "mismatched_keys"))
    return model.eval()


def places(model: Any) -> list[list[str]]:
    """Parameters of the value projections that braces would attach to, layer by layer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ffns = find_ffns(model)
    values = [[part.value if isinstance(part, FFN) else part.module for part in ffn.parts] for ffn in ffns]
    return [sorted(names[p] for end in ends for p in end.parameters() if "braces" not in names[p]) for ends in values]


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["token path", "steered"])
@pytest.mark.parametrize("name", BASES)
def test_the_checkpoint_gives_the_adapters_numbers_and_tokens(
    name: str, shift: torch.Tensor | None, tmp_path: Path
) -> None:
    """float32: logits within 1e-5, 48 greedy tokens the same; also after it is saved and loaded once more. Its
    feed-forward layers are those of the base, not the side paths."""
    model = BASES[name]()
    bare, sites = logits(model), places(model)
    expected, text = written(model, tmp_path, shift)
    assert relative(bare, expected) > 1e-2, "the adapter does nothing"
    loaded = load(tmp_path / "code")
    assert relative(logits(loaded), expected) < 1e-5
    assert torch.equal(greedy(loaded), text)
    assert places(loaded) == sites
    if name == "qwen3":
        loaded.save_pretrained(tmp_path / "again")
        assert relative(logits(load(tmp_path / "again")), expected) < 1e-5


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["push alone", "with a shift"])
@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_a_push_is_written_beside_the_adapter(name: str, shift: torch.Tensor | None, tmp_path: Path) -> None:
    steering_vector = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    expected, _ = written(BASES[name](), tmp_path, shift, steering_vector=steering_vector)
    assert relative(logits(load(tmp_path / "code")), expected) < 1e-5


def test_a_push_that_no_side_path_can_carry_is_refused(tmp_path: Path) -> None:
    """Behind a mixture of experts, and in a layer without an adapter."""
    steering_vector = torch.ones(32)
    with pytest.raises(ConfigError, match="layer 0 is steered"):
        written(BASES["qwen3_moe"](), tmp_path, None, steering_vector=steering_vector)
    adapter = attach(BASES["qwen3"](), 4, [1])
    with pytest.raises(ConfigError, match="layer 0 is steered"):
        side_paths(adapter, {0: steering_vector, 1: steering_vector})
    assert side_paths(adapter, {1: steering_vector})[0].constant is not None


def test_files_of_the_base_are_linked_and_only_the_side_path_is_new(tmp_path: Path) -> None:
    """One weight file or several; the modelling file imports torch and transformers alone."""
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
    adapter = attach(model, 4)
    open_gates(adapter)
    expected, sides = logits(frozen(adapter, None).model), side_paths(adapter)
    adapter.detach()
    write_checkpoint_with_code(tmp_path / "sharded", model, sides, tmp_path / "many")
    assert relative(logits(load(tmp_path / "sharded")), expected) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_a_copy_of_the_model_is_independent(name: str, tmp_path: Path) -> None:
    """Hooks of a copy use the copy's side path."""
    expected, _ = written(BASES[name](), tmp_path)
    loaded = load(tmp_path / "code")
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        for parameter_name, parameter in loaded.named_parameters():
            if "braces_" in parameter_name:
                parameter.zero_()
    assert relative(logits(other), expected) < 1e-5
    assert relative(logits(loaded), expected) > 1e-2


def test_the_model_without_its_head_has_the_side_path_too(tmp_path: Path) -> None:
    """As servers load it: AutoModel, whose names lack the prefix of the causal model."""
    model = tiny_model("qwen3")
    written(model, tmp_path)
    whole, body = load(tmp_path / "code"), load(tmp_path / "code", AutoModel)
    assert type(body).__name__ == "BracesQwen3Model"
    with torch.no_grad():
        expected = whole.model(input_ids=TOKENS).last_hidden_state
        assert torch.equal(body(input_ids=TOKENS).last_hidden_state, expected)


def test_servers_that_replace_modules_are_told_so(tmp_path: Path) -> None:
    """Where the side path is on experts, or joins two modules by hooks, the class supports no attention backend."""
    for name, supported in (("qwen3", True), ("bloom", False), ("qwen3_moe", False)):
        written(BASES[name](), tmp_path / name)
        assert load(tmp_path / name / "code")._supports_attention_backend is supported


@pytest.mark.slow
def test_the_command_writes_a_proved_folder(braces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an attribute at a fixed strength; a wrong side path fails the proof and leaves nothing."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.options import LoadOptions

    tiny_model("qwen3", max_position_embeddings=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    session = open_session(str(tmp_path / "base"), None, LoadOptions(device="cpu"))
    adapter = make_adapter(session, tmp_path / "adapter")
    call = ("export", "code", "--adapter", adapter, "--attribute", "positive", "--s", 2, "--format", "json")
    done = braces(*call, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["architecture"] == "BracesQwen3ForCausalLM"
    assert done.json["max_logit_difference"] < 1e-4 < done.json["adapter_effect"]
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    monkeypatch.setattr("braces_cli.export.code._tensors", _halved)
    done = braces(*call, "--output-dir", tmp_path / "wrong")
    assert done.code == 4
    assert "its logits differ" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def _halved(sides: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = {}
    for side in sides:
        found[f"{side.path}.braces_in.weight"] = side.reads.to(dtype)
        found[f"{side.path}.braces_out.weight"] = side.writes.to(dtype) / 2
        if side.constant is not None:
            found[f"{side.path}.braces_out.bias"] = side.constant
    return found


def test_bad_input_is_refused(braces: Any, adapter_dir: Path, tmp_path: Path) -> None:
    """No adapter, no output folder, an output folder inside the adapter's, a quantised base."""
    call = ("export", "code", "--output-dir", tmp_path / "out")
    done = braces(*call)
    assert (done.code, "--adapter" in done.err) == (2, True)
    done = braces("export", "code", "--adapter", adapter_dir)
    assert (done.code, "--output-dir" in done.err) == (2, True)
    done = braces("export", "code", "--adapter", adapter_dir, "--output-dir", adapter_dir / "out")
    assert (done.code, "overlaps the input" in done.err) == (2, True)
    done = braces(*call, "--adapter", adapter_dir, "--quantize", "int8")
    assert (done.code, "--quantize" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_base_with_its_own_code_is_refused(tmp_path: Path) -> None:
    """Its file and ours would both be needed."""
    model = tiny_model("qwen3")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    with pytest.raises(ModelError, match="brings its own code"):
        write_checkpoint_with_code(tmp_path, model, [], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER)
def test_older_transformers_give_the_same_numbers(version: str, tmp_path: Path) -> None:
    """In an environment of its own, where only transformers and its hub client differ."""
    site = _older(version, tmp_path / "site")
    names = ("qwen3", "gemma3_text", "mistral", "phi3", "qwen3_moe", "bloom", "gpt_neox")
    expected = {name: written(BASES[name](), tmp_path / name)[0] for name in names}
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    folders = json.dumps({name: str(tmp_path / name / "code") for name in names})
    answer = tmp_path / "answer.safetensors"
    call = [sys.executable, "-c", _PROGRAM, folders, version, str(tmp_path / "tokens.safetensors"), str(answer)]
    env = {**os.environ, "PYTHONPATH": str(site), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(call, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(answer)
    for name in names:
        assert relative(found[name], expected[name]) < 1e-5, name


def _older(version: str, site: Path) -> Path:
    """A folder for PYTHONPATH with an older transformers."""
    # With what it needs: an older hub client, but not torch, which transformers leaves to its users.
    call = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), f"transformers=={version}"]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NOT TESTED with transformers {version}: pip cannot install it here")
    return site
