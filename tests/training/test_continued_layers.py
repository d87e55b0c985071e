"""Layers that the base does not have: an option's fault, or that of the adapter that is continued."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.training.settings import TrainSettings
from braces_cli.training.setup import adapted_layers
from tests.conftest import tiny_model


def test_layers_beyond_the_base_are_the_fault_of_who_named_them() -> None:
    model = tiny_model()
    assert adapted_layers(model, TrainSettings(layers="0-1", adapter="name")) == [0, 1]
    with pytest.raises(ConfigError, match="out of range"):
        adapted_layers(model, TrainSettings(layers="0,99"))
    with pytest.raises(ModelError, match="not those of the base") as caught:
        adapted_layers(model, TrainSettings(layers="0,99", adapter="name"))
    assert caught.value.where == "name"
