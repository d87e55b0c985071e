"""A base with slots has the base's logits, and LoRA files on it, by peft, those of adapters and attributes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import Adapter, attach, attached, open_session
from braces_cli.core.attributes.hooks import constants, steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import build_attribute, save_attributes
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.options import LoadOptions
from braces_cli.export.lora import LoraRequest, lora_pairs, read_folder, side_path, write_folder, write_lora
from braces_cli.export.request import Request
from braces_cli.export.slots import RECORD_FILE, Slots, read_slots, write_slots
from tests.conftest import make_adapter, open_gates, tiny_model, tiny_tokenizer
from tests.core.architectures import tiny
from tests.core.invariants import relative
from tests.export.architecture_columns import SHIFT, frozen, write_slotted
from tests.export.test_merge import phi3

peft = pytest.importorskip("peft", reason="NOT TESTED: LoRA files need the package peft")
from peft.tuners.lora import LoraLayer  # noqa: E402

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
BASES: dict[str, Any] = {
    "llama": lambda: tiny_model("llama"),
    "qwen2": lambda: tiny_model("qwen2", tie_word_embeddings=True),
    "mistral": lambda: tiny_model("mistral", sliding_window=None),
    "phi3": phi3,
    "gpt2": lambda: tiny_model("gpt2", n_positions=128),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
    "opt": lambda: tiny_model("opt"),
    "modernbert-decoder": lambda: tiny("modernbert-decoder"),
}


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def greedy(model: Any, tokens: torch.Tensor = TOKENS[:, :4]) -> torch.Tensor:
    config = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=1)
    with torch.no_grad():
        return model.generate(input_ids=tokens, generation_config=config)


def carry(model: Any, seed: int = 1, strength: float = 0.0) -> Adapter:
    """An adapter of rank 4, steered by SHIFT at a strength."""
    adapter = attach(model, 4, seed=seed)
    open_gates(adapter, seed)
    return frozen(adapter, strength * SHIFT if strength else None)


def scaled(model: Any, scales: dict[str, float]) -> Any:
    """The peft model with these LoRA files active at these scales."""
    model.base_model.set_adapter(list(scales))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, scale in scales.items():
                module.set_scale(name, scale)
    return model.eval()


def lora_folders(model: Any, slots: Slots, folder: Path) -> dict[str, Path]:
    """Two adapters, one of them on other slots too, and an attribute of the first, as folders."""
    paths = {}
    for name, seed in (("one", 1), ("two", 2)):
        adapter = carry(model, seed)
        paths[name] = side_path(adapter)
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
        write_folder(folder / name, pairs, slots, folder)
    return {name: folder / name for name in found}


@pytest.fixture(params=list(BASES))
def served(request: Any, tmp_path: Path) -> tuple[Any, Any, Slots]:
    """(base, the same base with slots and LoRA folders in peft, its slots)."""
    model = BASES[request.param]()
    slots, loaded = write_slotted(model, tmp_path / "slots", TOKENS, count=32)
    assert relative(logits(loaded), logits(model)) < 1e-6
    folders = lora_folders(model, slots, tmp_path / "lora")
    wrapped = peft.PeftModel.from_pretrained(loaded, folders["one"], adapter_name="one")
    for name in list(folders)[1:]:
        wrapped.load_adapter(folders[name], adapter_name=name)
    return model, wrapped, slots


def test_lora_files_give_the_adapters_numbers_and_tokens(served: tuple[Any, Any, Slots]) -> None:
    """Adapter at scale 1 with its attribute at scales -2, 0 and 3; then another adapter in the same process."""
    model, wrapped, _ = served
    bare = logits(model)
    for strength in (-2.0, 0.0, 3.0):
        adapter = carry(model, 1, strength)
        expected, text = logits(model), greedy(model)
        adapter.detach()
        found = scaled(wrapped, {"one": 1.0, "attribute": strength})
        assert relative(bare, expected) > 1e-2, "the adapter does nothing"
        assert relative(logits(found), expected) < 1e-5
        assert torch.equal(greedy(found), text)
        if strength == 3.0:
            assert relative(logits(scaled(wrapped, {"both": 1.0})), expected) < 1e-5
    adapter = carry(model, 2)
    expected = logits(model)
    adapter.detach()
    assert relative(logits(scaled(wrapped, {"two": 1.0})), expected) < 1e-5
    assert relative(logits(scaled(wrapped, {"one": 1.0})), expected) > 1e-2, "the adapters are the same"
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("name", ["embedded", "reviews10M"])
def test_real_models_with_slots(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """float32: an adapter of rank 16 with its attribute at -2, 0 and 3, then another adapter; 64 greedy tokens."""
    place = name if name == "embedded" else str(request.getfixturevalue("shared") / "models" / name)
    session = open_session(place, None, LoadOptions(device="cpu", dtype="float32"))
    model = session.base.model
    tokens = torch.tensor([session.base.tokenizer("The film was a little")["input_ids"]])
    slots, loaded = write_slotted(model, tmp_path / "slots", tokens, count=64)
    assert relative(logits(loaded, tokens), logits(model, tokens)) < 1e-6
    made = [find_adapter(str(make_adapter(session, tmp_path / f"adapter{seed}", 16, seed))) for seed in (1, 2)]
    attribute: Any = None
    folders: list[Path] = []
    for index, stored in enumerate(made):
        with attached(session, stored) as adapter:
            attribute = attribute or find_attribute(session, "positive", None)
            pairs = [lora_pairs(side_path(adapter), {}, slots)]
            if index == 0:
                pairs.append(lora_pairs({}, constants(session, [(attribute, 1.0)]), slots))
        for each in pairs:
            folders.append(tmp_path / f"lora{len(folders)}")
            folders[-1].mkdir()
            write_folder(folders[-1], each, slots, tmp_path)
    wrapped: Any = peft.PeftModel.from_pretrained(loaded, folders[0], adapter_name="one")
    wrapped.load_adapter(folders[1], adapter_name="positive")
    wrapped.load_adapter(folders[2], adapter_name="two")
    for stored, strength, scales in (
        (made[0], -2.0, {"one": 1.0, "positive": -2.0}),
        (made[0], 0.0, {"one": 1.0, "positive": 0.0}),
        (made[0], 3.0, {"one": 1.0, "positive": 3.0}),
        (made[1], 0.0, {"two": 1.0}),
    ):
        with attached(session, stored), steered(session, [(attribute, strength)]):
            expected, text = logits(model, tokens), greedy(model, tokens)
        found = scaled(wrapped, scales)
        assert relative(logits(found, tokens), expected) < 1e-5
        assert torch.equal(greedy(found, tokens), text)


def test_two_adapters_at_once_need_slots_of_their_own(tmp_path: Path) -> None:
    """Apart they add up, on the same slots they do not; peft's weighted sum of all is the same LoRA."""
    model = tiny_model("llama")
    slots, loaded = write_slotted(model, tmp_path / "slots", TOKENS, count=32)
    folders = lora_folders(model, slots, tmp_path / "lora")
    wrapped: Any = peft.PeftModel.from_pretrained(loaded, folders["one"], adapter_name="one")
    for name in ("two", "apart", "attribute"):
        wrapped.load_adapter(folders[name], adapter_name=name)
    second = carry(model, 2)
    path = side_path(second)
    second.detach()
    adapter = carry(model, 1, -2.0)
    handles = []
    for layer, (reads, writes) in path.items():

        def add(module: Any, args: tuple, output: Any, reads: Any = reads, writes: Any = writes) -> torch.Tensor:
            return output + args[0] @ reads.mT @ writes.mT

        handles.append(model.model.layers[layer].mlp.register_forward_hook(add))
    expected = logits(model)
    for handle in handles:
        handle.remove()
    adapter.detach()
    assert relative(logits(scaled(wrapped, {"one": 1.0, "apart": 1.0, "attribute": -2.0})), expected) < 1e-5
    assert relative(logits(scaled(wrapped, {"one": 1.0, "two": 1.0, "attribute": -2.0})), expected) > 1e-3
    names = ["one", "apart", "attribute"]
    scaled(wrapped, dict.fromkeys(names, 1.0))
    wrapped.base_model.add_weighted_adapter(names, [1.0, 1.0, -2.0], "sum", combination_type="cat")
    wrapped.base_model.set_adapter("sum")
    assert relative(logits(wrapped.eval()), expected) < 1e-5


def test_an_adapter_on_some_layers_names_their_modules(tmp_path: Path) -> None:
    """The other layers get no LoRA at all; steering of one layer alone likewise."""
    model = tiny_model("llama")
    slots, loaded = write_slotted(model, tmp_path / "slots", TOKENS)
    adapter = attach(model, 4, [1])
    open_gates(adapter)
    frozen(adapter, SHIFT)
    expected, path = logits(model), side_path(adapter)
    adapter.detach()
    (tmp_path / "narrow").mkdir()
    write_folder(tmp_path / "narrow", lora_pairs(path, {1: path[1][1] @ SHIFT}, slots), slots, tmp_path)
    config = json.loads((tmp_path / "narrow" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    wrapped = peft.PeftModel.from_pretrained(loaded, tmp_path / "narrow").eval()
    assert sum(isinstance(module, LoraLayer) for module in wrapped.modules()) == 2
    assert relative(logits(wrapped), expected) < 1e-5


def test_an_architecture_without_biases_takes_adapters_and_no_attributes(tmp_path: Path) -> None:
    """Its record has no constant slot."""
    model = tiny("musicgen")
    slots, _ = write_slotted(model, tmp_path, torch.randint(3, 96, (4, 8)))
    assert slots.constant is None
    assert slots.rank == (slots.wider - slots.width) // 2


def options() -> LoadOptions:
    return LoadOptions(device="cpu")


@pytest.fixture
def slots_dir(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with slots as the command writes it; what proves it is tested elsewhere."""
    from braces_cli.export.verify import Verification

    with monkeypatch.context() as patch:
        patch.setattr(
            "braces_cli.export.slots.verify_export", lambda folder, expected, how: Verification(0.0, 0.0, 0.0, expected)
        )
        write_slots(Request(str(model_dir), None, options()), 8, tmp_path / "slots")
    return tmp_path / "slots"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_commands_write_proved_folders(
    braces: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each proved by plain transformers and peft in a process without braces; the GGUF file holds the same numbers."""
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
    # A built-in attribute pushes the first half of the layers: here layer 0.
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj"]
    assert "scale is the strength s" in (tmp_path / "positive" / "README.md").read_text()
    gguf = pytest.importorskip("gguf", reason="NOT TESTED: the package gguf is not there")
    stored = {
        tensor.name: torch.tensor(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "positive.gguf").tensors
    }
    pairs = read_folder(tmp_path / "positive")
    a, b = pairs["model.layers.0.mlp.down_proj"]
    assert len(stored) == 2 * len(pairs)
    assert torch.equal(stored["blk.0.ffn_down.weight.lora_a"], a)
    assert torch.equal(stored["blk.0.ffn_down.weight.lora_b"], b)
    assert names(tmp_path) == ["adapter", "positive", "positive.gguf", "slots"], "nothing half-written stays"
    assert braces(*attribute).code == 2

    def faint(*args: Any, **kwargs: Any) -> Any:
        return {module: (a, 0.9 * b) for module, (a, b) in lora_pairs(*args, **kwargs).items()}

    monkeypatch.setattr("braces_cli.export.lora.lora_pairs", faint)
    done = braces(*call, "--output-dir", tmp_path / "wrong")
    assert done.code == 4
    assert "logits differ" in done.err
    assert "wrong" not in names(tmp_path)


def test_a_dry_run_counts_without_weights(
    braces: Any, slots_dir: Path, model_dir: Path, adapter_dir: Path, session: Any, tmp_path: Path
) -> None:
    """What slots there would be, and how large a LoRA; of what cannot be exported the reason."""
    done = braces("export", "slots", "--model", model_dir, "--slots", 8, "--dry-run", "--format", "json")
    assert done.code == 0, done.err
    slots = read_slots(slots_dir)
    assert (done.json["width"], done.json["rank"]) == (slots.wider, slots.rank)
    call = ("export", "lora", "--base", slots_dir, "--adapter", adapter_dir, "--dry-run", "--format", "json")
    found = braces(*call).json
    assert found["parameters"] == 2 * (2 * 4 * 32 + 2 * 4 * slots.wider)
    found = braces(*call, "--attribute", "positive", "--layers", "1").json
    assert (found["rank"], found["parameters"]) == (1, 32 + slots.wider)
    # A built-in attribute pushes the first half of the layers, whichever the adapter has; one of the reduction `mean`
    # goes through the adapter.
    found = braces(*call, "--attribute", "positive").json
    assert (found["rank"], found["parameters"]) == (1, 32 + slots.wider)
    save_attributes(tmp_path / "attributes" / "mine.safetensors", [build_attribute(session, "mine", ["good"])])
    found = braces(*call, "--attribute", "mine", "--attributes", tmp_path / "attributes").json
    assert (found["rank"], found["parameters"]) == (1, 2 * (32 + slots.wider))
    tiny_model("qwen3").save_pretrained(tmp_path / "qwen3")
    assert (
        "cannot take slots: its gated FFN has no biases"
        in braces("export", "slots", "--model", tmp_path / "qwen3", "--dry-run", "--format", "json").json["reason"]
    )


def test_an_adapter_of_another_base_is_refused(slots_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """By the record of the slots, before anything is loaded."""
    record = json.loads((slots_dir / RECORD_FILE).read_text())
    record["fingerprint"]["sha256"] = "0" * 64
    (slots_dir / RECORD_FILE).write_text(json.dumps(record))
    lora_request = LoraRequest(Request(None, find_adapter(str(adapter_dir)), options()), slots_dir)
    with pytest.raises(ModelError, match="belong to another base"):
        write_lora(lora_request, tmp_path / "out")


def test_another_base_than_that_of_the_slots_is_refused(slots_dir: Path, tmp_path: Path) -> None:
    """An attribute alone has no adapter that knows its base."""
    tiny_model("llama", seed=1, max_position_embeddings=128).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    lora_request = LoraRequest(Request(str(tmp_path / "other"), None, options(), {"positive": 1.0}), slots_dir)
    with pytest.raises(ModelError, match="the base differs from that of the slots"):
        write_lora(lora_request, tmp_path / "out")
    assert "out" not in names(tmp_path)


def test_more_ranks_than_slots_are_refused(slots_dir: Path, session: Any, tmp_path: Path) -> None:
    """With the number of slots that would do."""
    rank = read_slots(slots_dir).rank
    wide = find_adapter(str(make_adapter(session, tmp_path / "wide", rank=8)))
    with pytest.raises(ConfigError, match="more slots than") as caught:
        write_lora(LoraRequest(Request(None, wide, options()), slots_dir, first_slot=rank - 7), tmp_path / "out")
    assert f"--slots {rank + 2}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"attributes": {"positive": 0.0}}, "at strength 0"), ({"attributes": {"positive": 1.0}, "layers": "5"}, "range")],
)
def test_nothing_to_steer_is_refused(
    change: dict[str, Any], words: str, slots_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """Strength 0, and layers that are not there."""
    lora_request = LoraRequest(Request(None, find_adapter(str(adapter_dir)), options(), **change), slots_dir)
    with pytest.raises(ConfigError, match=words):
        write_lora(lora_request, tmp_path / "out")


def test_layers_that_the_adapter_lacks_are_refused(slots_dir: Path, session: Any, tmp_path: Path) -> None:
    """An attribute without a direction goes through the adapter, and one on layer 1 cannot steer layer 0."""
    make_adapter(session, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    adapter = attach(session.base.model, 4, [1])
    from braces_cli.core.adapter.files import AdapterConfig

    adapter.save(tmp_path / "narrow", AdapterConfig(**config | {"layers": [1]}), "# test\n")
    adapter.detach()
    save_attributes(tmp_path / "attributes" / "mine.safetensors", [build_attribute(session, "mine", ["good"])])
    folder = tmp_path / "attributes"
    request = Request(None, find_adapter(str(tmp_path / "narrow")), options(), {"mine": 1.0}, folder, layers="0")
    with pytest.raises(ConfigError, match="has no layer 0"):
        write_lora(LoraRequest(request, slots_dir), tmp_path / "out")


def test_missing_options_are_named(slots_dir: Path, adapter_dir: Path, tmp_path: Path, braces: Any) -> None:
    """Neither adapter nor attribute; --combine with one of them; no folder of slots; no output folder."""
    call = ("export", "lora", "--output-dir", tmp_path / "out")
    assert "--base" in braces(*call).err
    assert "--adapter, --attribute" in braces(*call, "--base", slots_dir).err
    assert "--combine" in braces(*call, "--base", slots_dir, "--adapter", adapter_dir, "--combine").err
    missing = braces(*call, "--base", adapter_dir, "--adapter", adapter_dir)
    assert (missing.code, "no base with slots here" in missing.err) == (4, True)
    assert "--output-dir" in braces("export", "slots").err


def test_records_of_another_version_or_damaged_are_refused(slots_dir: Path) -> None:
    """The file is named."""
    good = (slots_dir / RECORD_FILE).read_text()
    for text, words in (
        (good.replace('"format_version": 1', '"format_version": 2'), "format version 2, this braces reads 1"),
        (good.replace('"wider"', '"wide"'), "no key `wider`"),
        ("[1]", "expected an object"),
        ("{", "broken JSON"),
    ):
        (slots_dir / RECORD_FILE).write_text(text)
        with pytest.raises(ModelError, match=words) as caught:
            read_slots(slots_dir)
        assert RECORD_FILE in str(caught.value.where)


def test_a_base_that_takes_no_slots_is_refused_with_what_works(tmp_path: Path) -> None:
    """Qwen3 has no biases and is no Llama."""
    tiny_model("qwen3", max_position_embeddings=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="cannot take slots: its gated FFN has no biases") as caught:
        write_slots(Request(str(tmp_path / "base"), None, options()), 8, tmp_path / "out")
    assert "braces export code" in str(caught.value.hint)
    assert names(tmp_path) == ["base"]


def test_gguf_is_refused_for_names_that_are_not_known(slots_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Before anything is loaded."""
    record = json.loads((slots_dir / RECORD_FILE).read_text()) | {"architecture": "GPT2LMHeadModel"}
    (slots_dir / RECORD_FILE).write_text(json.dumps(record))
    lora_request = LoraRequest(Request(None, find_adapter(str(adapter_dir)), options()), slots_dir)
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not among"):
        write_lora(lora_request, tmp_path / "out", tmp_path / "out.gguf")


def test_the_gguf_may_lie_in_the_folder(
    slots_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears with the folder, and is replaced with it."""
    from braces_cli.export.verify import Verification

    pytest.importorskip("gguf", reason="NOT TESTED: the package gguf is not there")
    patched = "braces_cli.export.lora.verify_export"
    monkeypatch.setattr(patched, lambda folder, expected, how: Verification(0.0, 0.0, 0.0, expected))
    lora_request = LoraRequest(Request(None, find_adapter(str(adapter_dir)), options()), slots_dir)
    for overwrite in (False, True):
        write_lora(lora_request, tmp_path / "out", tmp_path / "out" / "adapter.gguf", overwrite)
        assert "adapter.gguf" in names(tmp_path / "out")
        assert not list(tmp_path.rglob(".*"))
    with pytest.raises(ConfigError, match="not empty"):
        write_lora(lora_request, tmp_path / "out", tmp_path / "out" / "other.gguf")
