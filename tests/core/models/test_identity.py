"""Identity of a base: its samples fit every copy of the base, and no other base."""

import copy
import importlib.util
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import attach, attach_stored, open_session
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.vector import load_attributes, save_attributes
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.identity import SAMPLES, check_same_base
from braces_cli.core.models.load import Base, load_base
from braces_cli.core.options import LoadOptions
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer
from tests.core.architectures import tiny
from tests.core.invariants import EXACT
from tests.core.test_architectures import rows

# Dense, with Conv1D, loose in the layer, fused; experts that are stacked, transposed, and next to shared ones.
QUICK = {"llama", "gpt2", "opt", "phi3", "mixtral", "gpt_oss", "qwen2_moe", "llama4_text"}
# Transformers does not read these checkpoints of its own as causal language models, or not completely.
NOT_READ = {"emu3", "lara_mini", "mllama", "musicgen", "musicgen_melody", "sarvam_moe"}
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, row in rows().items()
    if row.split("|")[3].strip() == EXACT and name not in NOT_READ
]


def check(stored: Base, base: Base) -> None:
    """Compare two bases as files of the first one are compared with the second."""
    samples = {ffn.layer: ffn.samples for ffn in stored.ffns}
    check_same_base("this file is of", stored.sizes, samples, base, "file")


def base_of(model: Any) -> Base:
    return Base(model, None, "base")


@pytest.mark.parametrize("name", NAMES)
def test_every_copy_of_a_base_is_the_same_base(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Saved in each dtype, as `.bin`, in several files and packed; another seed and a rescaled copy are other bases."""
    model, tokenizer = tiny(name), tiny_tokenizer()
    stored = base_of(model)
    assert stored.samples.shape == (len(stored.ffns), SAMPLES)
    check(stored, stored)

    def loaded(folder: Path, **options: Any) -> Base:
        return load_base(str(folder), LoadOptions(device="cpu", **options), tokenizer)

    model.save_pretrained(tmp_path / "float32")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    for dtype in ("bfloat16", "float16"):
        copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(load_file(tmp_path / "float32" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("float32", "shards", "bfloat16", "float16", "bin"):
        check(stored, loaded(tmp_path / folder))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert not [record for record in caplog.records if record.name == "braces"], "rounding is not a difference"
    if importlib.util.find_spec("torchao") is not None:
        with suppress(ConfigError):  # torchao packs nothing in GPT-2
            check(stored, loaded(tmp_path / "float32", quantize="int8"))
    with pytest.raises(ModelError, match="other value matrices: correlation"):
        check(stored, base_of(tiny(name, seed=1)))
    with torch.no_grad():
        for ffn in stored.ffns:
            for part in ffn.parts:
                part.value_matrix().mul_(1.2)
    with pytest.raises(ModelError, match=r"slope 1\.[2-9]"):  # layers can share a matrix
        check(stored, base_of(model))


def test_positions_depend_on_the_shape_only() -> None:
    """Conv1D, separate experts and stacked experts have the samples of the plain matrix."""
    llama, gpt2, mixtral = tiny_model("llama"), tiny_model("gpt2"), tiny("mixtral")
    for model in (llama, gpt2, mixtral):
        for ffn in base_of(model).ffns:
            values = ffn.value_matrix()
            places = [int(k * 0x9E3779B97F4A7C15 % 2**64) * values.numel() >> 64 for k in range(64)]
            assert torch.equal(ffn.samples, values.reshape(-1)[places])
            assert len(set(places)) == SAMPLES


def test_a_difference_of_more_than_rounding_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    """For an unquantised base, with its size."""
    model = tiny_model()
    stored = base_of(copy.deepcopy(model))
    with torch.no_grad():
        for ffn in base_of(model).ffns:
            ffn.value.weight.add_(0.05 * ffn.value.weight.std() * torch.randn_like(ffn.value.weight))
    with caplog.at_level(logging.INFO):
        check(stored, Base(model, None, "model.Q4_K_M.gguf"))
        assert not caplog.records
        check(stored, base_of(model))
    assert "differ by 5." in caplog.text or "differ by 4." in caplog.text


def test_zeros_match_zeros_only() -> None:
    model, zero = tiny_model(), tiny_model()
    with torch.no_grad():
        base_of(zero).ffns[1].value.weight.zero_()
    check(base_of(zero), base_of(copy.deepcopy(zero)))
    for one, other in ((model, zero), (zero, model)):
        with pytest.raises(ModelError, match=r"correlation 0\.00.*in layer 1"):
            check(base_of(one), base_of(other))


def test_another_base_is_used_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture, braces: Any) -> None:
    """If its width is the same; adapters and attributes, loaded, continued and resumed."""
    for name, changes in {"one": {}, "other": {"seed": 1}, "wide": {"hidden_size": 64}}.items():
        tiny_model("llama", max_position_embeddings=128, **changes).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    session = open_session(str(tmp_path / "one"), None, LoadOptions(device="cpu"))
    folder = make_adapter(session, tmp_path / "adapter")
    save_attributes(tmp_path / "calm.safetensors", [build_attribute(session, "calm", ["calm"])])
    for name, matches in (("other", "other value matrices"), ("wide", "hidden size 32, here 64")):
        allowed, strict = (
            open_session(str(tmp_path / name), None, LoadOptions(device="cpu", allow_other_base=allow))
            for allow in (True, False)
        )
        for read in (
            lambda session: attach_stored(session.base, find_adapter(str(folder))),
            lambda session: load_attributes(tmp_path / "calm.safetensors", session),
        ):
            with pytest.raises(ModelError, match=matches) as caught:
                read(strict)
            assert ("--allow-other-base" in str(caught.value.hint)) == (name == "other")
            if name == "other":
                caplog.clear()
                assert read(allowed)
                assert "another base" in caplog.text
            else:
                with pytest.raises(ModelError, match=matches):
                    read(allowed)
    call = ("steer", "--model", tmp_path / "other", "--adapter", folder, "--prompt", "a", "--max-new-tokens", 2)
    assert braces(*call).code == 4
    assert braces(*call, "--allow-other-base").code == 0


def test_sizes_are_compared_on_the_meta_device(session: Any) -> None:
    with torch.device("meta"):
        shape = base_of(tiny_model("llama", max_position_embeddings=128))
    check(session.base, shape)
    assert attach(shape.model, 4).layers == [0, 1]
    with torch.device("meta"):
        wide = base_of(tiny_model("llama", intermediate_size=60))
    with pytest.raises(ModelError, match="value vectors 52, here 60"):
        check(session.base, wide)
