"""Values that a script gives for settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from braces_cli.core.config import Settings, column_texts, from_python, layer_text, option
from braces_cli.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Some(Settings):
    """One setting of each type."""

    rank: int | None = option(None, help="", min=1)
    lr: float = option(1.0, help="")
    resume: bool = option(False, help="")
    dtype: str = option("auto", help="")
    layers: str | None = option(None, help="")
    columns: tuple[str, ...] = option((), help="")
    data: tuple[str, ...] = option((), help="")
    folder: Path | None = option(None, help="")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rank", np.int64(8), 8),
        ("rank", None, None),
        ("lr", 1, 1.0),
        ("lr", np.float32(0.5), 0.5),
        ("resume", True, True),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("dtype", torch.device("cuda", 1), "cuda:1"),
        ("dtype", Path("models/x"), "models/x"),
        ("columns", "a=b", ("a=b",)),
        ("columns", ["a=b", Path("c")], ("a=b", "c")),
        ("columns", None, ()),
        ("folder", "out", Path("out")),
        ("folder", Path("out"), Path("out")),
    ],
)
def test_a_value_is_made_into_the_settings_type(name, value, expected):
    found = from_python(Some, {name: value})
    assert found == {name: expected}
    assert type(found[name]) is type(expected)
    assert getattr(Some(**found), name) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", 8.0, "rank: 8.0 is not a whole number"),
        ("rank", True, "rank: True is not a whole number"),
        ("lr", 10**400, "is not a number"),
        ("lr", "0.1", "lr: '0.1' is not a number"),
        ("lr", None, "lr: None is not a number"),
        ("resume", 1, "resume: 1 is not True or False"),
        ("resume", np.bool_(True), "resume: np.True_ is not True or False"),
        ("dtype", 16, "dtype: 16 is not a text"),
        ("dtype", torch.zeros(1), "dtype: tensor([0.]) is not a text"),
        ("columns", torch.tensor([5, 6]), "columns: tensor(5) is not a text"),
        ("columns", {"prompt": "question"}, "columns: {'prompt': 'question'} is not a text"),
        ("data", [{"text": "a"}], "data: {'text': 'a'} is not a text\nWrite rows into a file"),
        ("folder", 3, "folder: 3 is not a path"),
        ("learning_rate", 1.0, "no setting `learning_rate`\nUse `lr`."),
        ("given", {}, "no setting `given`"),
    ],
)
def test_other_types_and_names_are_refused(name, value, message):
    with pytest.raises(ConfigError) as error:
        from_python(Some, {name: value})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(3, "3"), ([0, 1], "0,1"), (range(2, 5), "2,3,4"), (np.arange(2), "0,1"), ("8-20", "8-20"), (None, None)],
)
def test_layers_may_be_numbers(layers, expected):
    assert layer_text(layers) == expected


def test_no_layer_is_not_all_layers():
    """Nor are truth values layers: those stay what they are, and are refused as any other type."""
    for nothing in ([], range(0), np.arange(0)):
        with pytest.raises(ConfigError, match="layers: no layers"):
            layer_text(nothing)
    assert layer_text(True) is True
    assert layer_text([True]) == [True]


def test_columns_may_be_a_mapping():
    assert column_texts({"prompt": "question"}) == ["prompt=question"]
    assert column_texts("prompt=question") == "prompt=question"


def test_a_number_below_the_smallest_is_refused_from_a_script_too():
    """The command line's parser does so for its own."""
    with pytest.raises(ConfigError, match="--rank: 0 is out of range"):
        Some(rank=0)
