"""The options of generating texts stand in one place, and bad values are refused before a model is loaded."""

from __future__ import annotations

import dataclasses

import pytest

from braces_cli.core.errors import ConfigError
from braces_cli.core.models.generate import Sampling
from braces_cli.core.models.options import GenerationSettings


def test_sampling_takes_its_defaults_from_the_options():
    defaults = {each.name: each.default for each in dataclasses.fields(GenerationSettings)}
    assert (defaults["num_samples"], defaults["max_new_tokens"]) == (1, 50)
    assert (defaults["temperature"], defaults["top_p"]) == (1.0, 0.9)
    for name in ("max_new_tokens", "temperature", "top_p"):
        assert getattr(Sampling(), name) == defaults[name]


@pytest.mark.parametrize("kind", [GenerationSettings, Sampling])
@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.1)]
)
def test_what_no_token_can_be_drawn_with_is_refused(kind, name, value):
    with pytest.raises(ConfigError, match="out of range") as caught:
        kind(**{name: value})
    assert caught.value.where == "--" + name.replace("_", "-")
