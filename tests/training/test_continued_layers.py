"""Layers that the base does not have: an error of the option, or of the adapter that is continued."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.training.run import resolve
from braces_cli.training.settings import TrainSettings
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer


def test_layers_beyond_the_base(session, model_dir, tmp_path) -> None:
    folder = make_adapter(session, tmp_path / "adapter")
    assert resolve(TrainSettings(adapter=str(folder))).layers == [0, 1]
    with pytest.raises(ConfigError, match="out of range"):
        resolve(TrainSettings(model=str(model_dir), layers="0,99"))
    smaller = tmp_path / "smaller"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(smaller)
    tiny_tokenizer().save_pretrained(smaller)
    with pytest.raises(ModelError, match="does not fit the base") as caught:
        resolve(TrainSettings(model=str(smaller), adapter=str(folder)))
    assert caught.value.where == str(folder)
