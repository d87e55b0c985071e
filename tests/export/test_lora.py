"""LoRA files on a base with slots have, through peft, the logits of adapters and attributes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.options import LoadOptions
from braces_cli.export.checkpoint import side_paths
from braces_cli.export.lora import export_lora, lora_pairs, plan_lora, value_pairs, write_folder, write_gguf_tensors
from braces_cli.export.run import Request
from braces_cli.export.slots import Slots, read_slots
from tests.conftest import make_adapter
from tests.core.comparison import relative
from tests.export.columns import write_slotted
from tests.export.models import MODELS, SHIFT, TOKENS, greedy, logits, names, with_adapter

BASES = ("llama", "qwen2", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "modernbert-decoder")


def scaled(model: Any, scales: dict[str, float]) -> Any:
    """Activate these LoRA files of the peft model at these scales."""
    model.base_model.set_adapter(list(scales))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, scale in scales.items():
                module.set_scale(name, scale)
    return model.eval()


def same_tensors(file: Path, folder: Path, layers: list[int]) -> None:
    """Compare the tensors of a GGUF file with those of a LoRA folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    stored = {each.name: torch.tensor(each.data.copy()) for each in gguf.GGUFReader(file).tensors}
    assert len(stored) == len(tensors) == 2 * len(layers)
    for layer in layers:
        module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        for name in ("A", "B"):
            found = stored[f"blk.{layer}.ffn_down.weight.lora_{name.lower()}"]
            assert torch.equal(found, tensors[f"{module}.lora_{name}.weight"])


def lora_folders(model: Any, slots: Slots, folder: Path) -> dict[str, Path]:
    """Write two adapters, the second also on other slots, and an attribute of the first."""
    paths = {}
    for name, seed in (("one", 1), ("two", 2)):
        adapter = with_adapter(model, seed=seed)
        paths[name] = side_paths(adapter)
        adapter.detach()
    vectors = {layer: writes @ SHIFT for layer, (_, writes) in paths["one"].items()}
    found = {
        "one": lora_pairs(paths["one"], {}, slots),
        "two": lora_pairs(paths["two"], {}, slots),
        "apart": lora_pairs(paths["two"], {}, slots, first=4),
        "attribute": lora_pairs({}, vectors, slots),
        "both": lora_pairs(paths["one"], {layer: 3 * vector for layer, vector in vectors.items()}, slots),
    }
    for name, pairs in found.items():
        (folder / name).mkdir(parents=True)
        write_folder(folder / name, pairs, slots.dtype, str(folder))
    return {name: folder / name for name in found}


def served(name: str, tmp_path: Path) -> tuple[Any, Any]:
    """(base, the base with slots and LoRA folders in peft)."""
    model = MODELS[name]()
    slots, loaded = write_slotted(model, tmp_path / "slots", TOKENS, count=32)
    assert relative(logits(loaded), logits(model)) < 1e-6
    folders = lora_folders(model, slots, tmp_path / "lora")
    wrapped = peft.PeftModel.from_pretrained(loaded, folders["one"], adapter_name="one")
    for name in list(folders)[1:]:
        wrapped.load_adapter(folders[name], adapter_name=name)
    return model, wrapped


@pytest.mark.parametrize("name", BASES)
def test_lora_files_have_the_adapters_logits_and_tokens(name: str, tmp_path: Path) -> None:
    """Adapter at scale 1 with its attribute at scales -2, 0 and 3; then another adapter in the same process."""
    model, wrapped = served(name, tmp_path)
    bare = logits(model)
    for strength in (-2.0, 0.0, 3.0):
        adapter = with_adapter(model, strength * SHIFT if strength else None)
        expected, text = logits(model), greedy(model)
        adapter.detach()
        found = scaled(wrapped, {"one": 1.0, "attribute": strength})
        assert relative(bare, expected) > 1e-2, "the adapter has no effect"
        assert relative(logits(found), expected) < 1e-5
        assert torch.equal(greedy(found), text)
        if strength == 3.0:
            assert relative(logits(scaled(wrapped, {"both": 1.0})), expected) < 1e-5
    adapter = with_adapter(model, seed=2)
    expected = logits(model)
    adapter.detach()
    assert relative(logits(scaled(wrapped, {"two": 1.0})), expected) < 1e-5
    assert relative(logits(scaled(wrapped, {"one": 1.0})), expected) > 1e-2, "the adapters are equal"
    assert torch.equal(logits(model), bare)


def test_two_adapters_at_once_need_different_slots(tmp_path: Path) -> None:
    """On different slots they add up; peft's weighted sum of all is the same LoRA."""
    model, wrapped = served("llama", tmp_path)
    second = with_adapter(model, seed=2)
    path = side_paths(second)
    second.detach()
    adapter = with_adapter(model, -2.0 * SHIFT)
    for layer, (reads, writes) in path.items():

        def add(module: Any, args: tuple, output: Any, reads: Any = reads, writes: Any = writes) -> torch.Tensor:
            return output + args[0] @ reads.mT @ writes.mT

        model.model.layers[layer].mlp.register_forward_hook(add)
    expected = logits(model)
    adapter.detach()
    assert relative(logits(scaled(wrapped, {"one": 1.0, "apart": 1.0, "attribute": -2.0})), expected) < 1e-5
    assert relative(logits(scaled(wrapped, {"one": 1.0, "two": 1.0, "attribute": -2.0})), expected) > 1e-3
    names = ["one", "apart", "attribute"]
    scaled(wrapped, dict.fromkeys(names, 1.0))
    wrapped.base_model.add_weighted_adapter(names, [1.0, 1.0, -2.0], "sum", combination_type="cat")
    wrapped.base_model.set_adapter("sum")
    assert relative(logits(wrapped.eval()), expected) < 1e-5


def test_the_commands_write_verified_folders(braces, model_dir, adapter_dir, tmp_path, monkeypatch, in_process):
    """A wrong LoRA fails the verification; the GGUF file has the same tensors."""
    done = braces("export", "slots", "--model", model_dir, "--output-dir", tmp_path / "slots", "--format", "json")
    assert done.code == 0, done.err
    assert done.json["width"] == 128  # 52 + 64, padded to 64
    assert done.json["rank"] == 75
    assert done.json["max_logit_difference"] < 1e-4
    assert read_slots(tmp_path / "slots").constant == 52
    call = ("export", "lora", "--base", tmp_path / "slots", "--adapter", adapter_dir, "--format", "json")
    attribute = (*call, "--attribute", "positive", "--output-dir", tmp_path / "positive")
    done = braces(*attribute, "--gguf", tmp_path / "positive.gguf")
    assert done.code == 0, done.err
    assert done.json["rank"] == 1
    assert done.json["max_logit_difference"] < 1e-4 < done.json["adapter_effect"]
    config = json.loads((tmp_path / "positive" / "adapter_config.json").read_text())
    # A built-in attribute steers the first half of the layers: here layer 0.
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj"]
    assert "scale is the strength s" in (tmp_path / "positive" / "README.md").read_text()
    same_tensors(tmp_path / "positive.gguf", tmp_path / "positive", [0])
    assert names(tmp_path) == ["adapter", "positive", "positive.gguf", "slots"], "a temporary folder is left"
    assert braces(*attribute).code == 2

    def faint(*args: Any, **kwargs: Any) -> Any:
        return {module: (a, 0.9 * b) for module, (a, b) in lora_pairs(*args, **kwargs).items()}

    monkeypatch.setattr("braces_cli.export.lora.lora_pairs", faint)
    done = braces(*call, "--output-dir", tmp_path / "wrong")
    assert done.code == 4
    assert "logits differ" in done.err
    assert "wrong" not in names(tmp_path)


def test_relevance_to_the_output_is_a_lora_for_the_base(
    braces: Any, output_dir: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    """Adapter, attribute and both: the logits in peft on the base, at several strengths; a wrong LoRA fails."""
    call = ("export", "lora", "--adapter", output_dir, "--format", "json")
    steer = ("--attribute", "positive", "--s", 1)
    for name, options in {"one": (), "positive": steer, "both": (*steer, "--combine")}.items():
        done = braces(*call, *options, "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
        assert done.json["max_logit_difference"] < 1e-4 < done.json["adapter_effect"]
        assert (done.json["rank"], done.json["bias"]) == (1 if name == "positive" else 4, name != "one")
        assert "slots" not in (tmp_path / name / "README.md").read_text()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    wrapped: Any = None
    for name in ("one", "positive", "both"):
        if wrapped is None:
            model = AutoModelForCausalLM.from_pretrained(model_dir)
            wrapped = peft.PeftModel.from_pretrained(model, tmp_path / name, adapter_name=name)
        else:
            wrapped.load_adapter(tmp_path / name, adapter_name=name)
    session = open_session(str(model_dir), str(output_dir), LoadOptions(device="cpu"))
    positive = find_attribute(session, "positive", None)
    for s in (0.0, -2.0, 1.0):
        with steered(session, [(positive, s)]):
            expected = logits(session.base.model)
        assert relative(logits(scaled(wrapped, {"one": 1.0, "positive": s})), expected) < 1e-5
    assert relative(logits(scaled(wrapped, {"both": 1.0})), expected) < 1e-5
    with session.bare():
        assert relative(logits(scaled(wrapped, {"one": 0.0})), logits(session.base.model)) < 1e-6

    def faint(*args: Any, **kwargs: Any) -> Any:
        pairs, biases = value_pairs(*args, **kwargs)
        return {module: (a, 0.9 * b) for module, (a, b) in pairs.items()}, biases

    monkeypatch.setattr("braces_cli.export.lora.value_pairs", faint)
    done = braces(*call, "--output-dir", tmp_path / "wrong")
    assert done.code == 4
    assert "logits differ" in done.err


def test_a_gguf_lora_for_the_base(braces: Any, output_dir: Path, tmp_path: Path, in_process: None) -> None:
    """The tensors of the LoRA; refused with an attribute, which needs a bias."""
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    call = ("export", "lora", "--adapter", output_dir, "--output-dir", out, "--gguf", file)
    refused = braces(*call, "--attribute", "positive")
    assert (refused.code, "control-vector" in refused.err, names(tmp_path)) == (4, True, ["adapter"])
    done = braces(*call)
    assert done.code == 0, done.err
    same_tensors(file, out, [0, 1])


def test_slots_are_for_relevance_to_the_input(braces: Any, output_dir: Path, session: Any, tmp_path: Path) -> None:
    call = ("export", "lora", "--output-dir", tmp_path / "out", "--adapter")
    done = braces(*call, output_dir, "--base", tmp_path)
    assert (done.code, "needs no slots" in done.err) == (2, True)
    done = braces(*call, make_adapter(session, tmp_path / "input"))
    assert (done.code, "braces export slots" in done.err) == (2, True)


def test_another_base_than_that_of_the_slots_is_refused(slots_dir, other_base, options, tmp_path):
    request = Request(other_base, None, options, tmp_path / "out", attributes={"positive": 1.0})
    with pytest.raises(ModelError, match="logits differ"):
        export_lora(plan_lora(request, slots_dir))
    assert "out" not in names(tmp_path)


def test_more_ranks_than_slots_are_refused(slots_dir: Path, session: Any, options: LoadOptions, tmp_path: Path) -> None:
    """The hint has the number of slots that is needed."""
    rank = read_slots(slots_dir).rank
    wide = find_adapter(str(make_adapter(session, tmp_path / "wide", rank=8)))
    with pytest.raises(ConfigError, match="more slots than the") as caught:
        plan_lora(Request(None, wide, options), slots_dir, first_slot=rank - 7)
    assert f"--slots {rank + 2}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attributes": {"positive": 0.0}}, "nothing is steered"),
        ({"attributes": {"positive": 1.0}, "layers": "5"}, "range"),
    ],
)
def test_nothing_to_steer_is_refused(change: dict[str, Any], words: str, slots_dir: Path, request_: Request) -> None:
    with pytest.raises(ConfigError, match=words):
        export_lora(plan_lora(replace(request_, model=None, **change), slots_dir))


def test_missing_options_are_named(slots_dir: Path, adapter_dir: Path, tmp_path: Path, braces: Any) -> None:
    """Neither adapter nor attribute; --combine with one of them; no base with slots."""
    call = ("export", "lora", "--output-dir", tmp_path / "out")
    assert "--base" in braces(*call).err
    assert "--adapter, --attribute" in braces(*call, "--base", slots_dir).err
    assert "--combine" in braces(*call, "--base", slots_dir, "--adapter", adapter_dir, "--combine").err
    missing = braces(*call, "--base", adapter_dir, "--adapter", adapter_dir)
    assert (missing.code, "braces_slots.json" in missing.err) == (4, True)


def test_gguf_is_refused_for_unknown_architectures(slots_dir: Path, request_: Request, tmp_path: Path) -> None:
    """Before anything is loaded."""
    record = json.loads((slots_dir / "braces_slots.json").read_text())
    (slots_dir / "braces_slots.json").write_text(json.dumps(record | {"architecture": "GPT2LMHeadModel"}))
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not among"):
        export_lora(plan_lora(request_, slots_dir), tmp_path / "out.gguf")


def test_the_gguf_file_may_be_in_the_folder(slots_dir: Path, request_: Request, tmp_path: Path) -> None:
    """--overwrite replaces both."""
    for overwrite in (False, True):
        planned = plan_lora(replace(request_, overwrite=overwrite), slots_dir)
        export_lora(planned, tmp_path / "out" / "adapter.gguf")
        assert "adapter.gguf" in names(tmp_path / "out")
        assert not list(tmp_path.rglob(".*"))
    with pytest.raises(ConfigError, match="not empty"):
        export_lora(plan_lora(request_, slots_dir), tmp_path / "out" / "other.gguf")


@pytest.mark.parametrize("size", [0, 20, 100, 300])
def test_a_truncated_gguf_file_is_an_error_and_removed(size, tmp_path, monkeypatch):
    """numpy does not notice a full disk; reading the file does."""
    close = gguf.GGUFWriter.close

    def truncate(writer: Any) -> None:
        close(writer)
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size > size
        os.truncate(file, size)

    tensors = {"direction.1": torch.arange(50.0)}
    write_gguf_tensors(tmp_path / "whole.gguf", "controlvector", tensors, lambda writer: None)
    (tmp_path / "whole.gguf").unlink()
    monkeypatch.setattr(gguf.GGUFWriter, "close", truncate)
    with pytest.raises(BracesError, match="differs from the tensors"):
        write_gguf_tensors(tmp_path / "v.gguf", "controlvector", tensors, lambda writer: None)
    assert not list(tmp_path.iterdir())
