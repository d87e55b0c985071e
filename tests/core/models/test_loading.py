"""Where a base came from, and tokenizers that do not fit or contradict themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.generate import TextRequest, generate
from braces_cli.core.models.load import checkpoint_folder, commit_of, load_base, load_tokenizer
from braces_cli.core.models.tokenize import encode
from braces_cli.core.options import LoadOptions, Sampling


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A branch moves on; the commit under it is what an adapter was trained on."""
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abc" / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: str(cached))
    folder = checkpoint_folder("owner/name", "main")
    assert commit_of("owner/name", "main", folder) == "0123abc"


def test_a_folder_has_no_commit(model_dir: Path) -> None:
    """What was given as revision is kept as it is."""
    folder = checkpoint_folder(str(model_dir), None)
    assert folder == model_dir
    assert commit_of(str(model_dir), None, folder) is None


@pytest.fixture
def edited(model_dir: Path, tmp_path: Path) -> Callable[[Callable[[Any], object]], str]:
    """A copy of the base with another `tokenizer.json`; its name."""

    def copy(change: Callable[[Any], object]) -> str:
        shutil.copytree(model_dir, tmp_path / "base")
        path = tmp_path / "base" / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return str(tmp_path / "base")

    return copy


def test_a_token_that_the_model_has_not_is_an_error_where_it_is_used(edited: Any, model_dir: Path) -> None:
    """As with the tokenizer of another model; texts without such a token are no matter."""

    token = load_tokenizer(str(model_dir)).tokenize("in the")[-1]
    name = edited(lambda content: content["model"]["vocab"].update({token: 100_000}))
    base = load_base(name, LoadOptions(device="cpu"))

    def run(text: str) -> None:
        base.model(base.tokenizer(text, return_tensors="pt")["input_ids"])

    run("a dog")
    with pytest.raises(ModelError, match="has token 100000, and the model embeds") as caught:
        run("in the")
    assert caught.value.where == name


def test_a_padding_token_that_the_model_has_not_is_replaced(edited: Any, tmp_path: Path) -> None:
    """As of models that were trained without one: rows of different length are padded with a token of the model."""
    name = edited(lambda content: content["model"]["vocab"].update({"[PAD]": 100_000}))
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "[PAD]"}))
    assert load_tokenizer(name).pad_token_id == 100_000
    base = load_base(name, LoadOptions(device="cpu"))
    texts = generate(base.model, base.tokenizer, [TextRequest("a", 0), TextRequest("a dog in the", 1)], Sampling(4))
    assert len(texts) == 2


def test_a_tokenizer_that_gives_up_is_an_error(edited: Any) -> None:
    """The library ends in no Exception there, but in what pyo3 makes of a panic: while it is used, and while loaded."""
    template = {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "nowhere", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }  # fmt: skip
    tokenizer = load_tokenizer(edited(lambda content: content.update(post_processor=template)))
    with pytest.raises(ModelError, match="the tokenizer fails on `a dog`"):
        encode(tokenizer, "a dog")


def test_a_tokenizer_that_gives_up_while_it_is_loaded(edited: Any) -> None:
    """See above."""
    name = edited(lambda content: content["model"].update(continuing_subword_prefix="longer than any piece" * 9))
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["", "x", "auto:1", "spread"])
def test_a_device_map_that_is_none_is_refused(model_dir: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a device") as caught:
        load_base(str(model_dir), LoadOptions(device="cpu", device_map=name))
    assert caught.value.where == "--device-map"


def test_a_config_of_an_encoder_and_decoder_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """It would load as what it is, and generate as what it is not."""
    shutil.copytree(model_dir, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="is_encoder_decoder"):
        load_base(str(tmp_path / "base"), LoadOptions(device="cpu"))


def test_a_name_that_no_file_can_have_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError):
        load_tokenizer("a" * 5000)
