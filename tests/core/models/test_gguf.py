"""GGUF files as models: what is read, what transformers leaves out, and files that cannot be read."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from braces_cli.core.adapter.model import open_session, open_shape
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.load import load_base, load_shape, load_tokenizer
from braces_cli.core.options import AdapterSettings, LoadOptions
from tests.conftest import make_adapter, tiny_tokenizer
from tests.core.comparison import relative
from tests.core.gguf_files import tiny_llama, write_gguf

CPU = LoadOptions(device="cpu")
TOKENS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.clamp(max=model.config.vocab_size - 1)).logits.float()


def test_a_file_has_model_tokenizer_and_template(tmp_path: Path) -> None:
    """Equal logits and tokens; files next to it do not count."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer)
    (tmp_path / "chat_template.jinja").write_text("other")
    for name in ("tokenizer.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    base = load_base(str(file), CPU)
    assert base.model.dtype == torch.float32
    assert torch.equal(logits(base.model), logits(model))
    text = "the film is good, and 12 days"
    assert base.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert base.tokenizer.chat_template == tokenizer.chat_template
    assert (base.name, base.revision, base.checkpoint) == (str(file), None, file)
    assert not hasattr(base.model.config, "quantization_config")
    shape, _ = open_shape(AdapterSettings(model=str(file)))
    assert [ffn.value_vectors for ffn in shape.ffns] == [64, 64]


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    """Such a file has no tensor of the head."""
    model = tiny_llama(tie_word_embeddings=True)
    state = model.state_dict()
    model.state_dict = lambda: {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    base = load_base(str(write_gguf(tmp_path / "tied.gguf", model)), CPU)
    assert base.model.config.tie_word_embeddings
    assert torch.equal(logits(base.model), logits(model))


def test_a_quantised_file_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    """Another dtype on request; no other quantisation on top."""
    model = tiny_llama()
    file = str(write_gguf(tmp_path / "q8.gguf", model, quantised=True))
    base = load_base(file, CPU)
    assert base.model.dtype == torch.bfloat16
    assert 0 < relative(logits(base.model), logits(model)) < 0.05
    single = load_base(file, LoadOptions(device="cpu", dtype="float32"))
    assert single.model.dtype == torch.float32
    assert relative(logits(single.model), logits(model)) < relative(logits(base.model), logits(model))
    with pytest.raises(ConfigError, match="cannot be quantised again") as caught:
        load_base(file, LoadOptions(device="cpu", quantize="int8"))
    assert caught.value.where == "--quantize"


def test_numbers_are_split_into_digits(tmp_path: Path) -> None:
    """As the tokenizer of SmolLM2 does; line breaks before a number then stay together."""

    def smollm(writer: Any) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.pre")
        writer.add_tokenizer_pre("smollm")

    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "smollm.gguf", change=smollm)))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "1", "2"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
        LLAMA3,
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_are_scaled(rope: dict[str, Any], tmp_path: Path) -> None:
    """Llama 3.1 and later have a tensor of factors instead of settings."""
    model = tiny_llama(rope_parameters=rope)

    def change(writer: Any) -> None:
        if rope["rope_type"] == "llama3":
            plain = rope["rope_theta"] ** -(torch.arange(0, 8, 2) / 8)
            writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
            return
        writer.add_string("llama.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
        if length := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(length)

    base = load_base(str(write_gguf(tmp_path / "scaled.gguf", model, change=change)), CPU)
    assert relative(logits(base.model), logits(model)) < 1e-5


def first_part(writer: Any) -> None:
    writer.add_uint16("split.count", 3)


def other_factors(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 3, 2, 8], dtype=np.float32))


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"tokenizer": False}, "the file has no tokenizer", "the checkpoint"),
        ({"change": first_part}, "one of 3 files of a split model", "llama-gguf-split --merge"),
        ({"change": other_factors}, "cannot take the scaling of positions", "the checkpoint"),
        ({"architecture": "nothing"}, "architecture nothing is not supported", "the checkpoint"),
        ({"weights": False}, "does not fill the model", ""),
    ],
    ids=["no tokenizer", "split", "positions", "architecture", "no weights"],
)
def test_files_that_cannot_be_read(settings: Any, message: str, hint: str, tmp_path: Path) -> None:
    """With the reason and a remedy."""
    file = str(write_gguf(tmp_path / "bad.gguf", **settings))
    with pytest.raises(ModelError, match=message) as caught:
        load_base(file, CPU)
    assert hint in str(caught.value.hint)
    assert caught.value.where == file


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    """Cut in the header, in the metadata, in the weights."""
    file = write_gguf(tmp_path / "cut.gguf")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    for load in (load_shape, load_tokenizer, load_base):
        with pytest.raises(ModelError, match="not a complete GGUF file"):
            load(str(file))


def test_other_paths_are_refused(model_dir: Path) -> None:
    for name, message in (("none.gguf", "no such file"), ("model.safetensors", "neither a folder nor GGUF")):
        with pytest.raises(ModelError, match=message):
            load_shape(str(model_dir / name))


def test_a_file_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with its repository; the commit is that of the file in the cache."""
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123abc" / "Q8"
    folder.mkdir(parents=True)
    file, asked = write_gguf(folder / "tiny.gguf"), []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", download)
    base = load_base("owner/name:Q8/tiny.gguf", LoadOptions(device="cpu", revision="main"))
    assert (base.name, base.revision) == ("owner/name:Q8/tiny.gguf", "0123abc")
    assert set(asked) == {("owner/name", "Q8/tiny.gguf", "main")}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """The last file is kept in memory."""
    file = write_gguf(tmp_path / "a.gguf")
    assert load_shape(str(file)).config.num_hidden_layers == 2
    shutil.copyfile(write_gguf(tmp_path / "b.gguf", tiny_llama(num_hidden_layers=1)), file)
    assert load_shape(str(file)).config.num_hidden_layers == 1


@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapter_fits_the_file_and_the_original(quantised, tmp_path, caplog):
    """Trained on either; quantisation is not noted as a difference. Another model is refused."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    names = (str(tmp_path / "original"), str(write_gguf(tmp_path / "tiny.gguf", model, quantised=quantised)))
    for trained_on, used_on in (names, names[::-1]):
        folder = make_adapter(open_session(trained_on, None, CPU), tmp_path / f"adapter of {Path(trained_on).stem}")
        assert open_session(used_on, str(folder), CPU).adapter is not None
    # transformers adds `<|endoftext|>` to byte-level vocabularies of GGUF files.
    assert not [message for message in caplog.messages if "another vocabulary" not in message]
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(seed=1), quantised=quantised)
    with pytest.raises(ModelError, match="another base"):
        open_session(str(other), str(folder), CPU)
