"""Adapter folders that are damaged, or not of braces."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from braces_cli.core.adapter.files import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_config
from braces_cli.core.errors import ModelError

FIRST = "layers.0.projection"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (FIRST, lambda _: None, f"missing tensor {FIRST}"),
        ("layers.9.gate", lambda _: torch.zeros(1), "unexpected tensor layers.9.gate"),
        (FIRST, lambda tensor: tensor[:2].clone(), r"\(2, 32\)"),
        (FIRST, lambda tensor: tensor.half(), "float16"),
        ("layers.0.gate", lambda tensor: torch.full_like(tensor, torch.nan), "not finite"),
        (FIRST, lambda tensor: tensor * 1.001, "not orthonormal"),
        ("layers.1.base_samples", lambda tensor: tensor[:9].clone(), r"\(64,\)"),
    ],
)
def test_a_damaged_tensor_is_named(adapter_dir, name, change, message):
    """Names, shapes, dtypes, finite numbers and orthonormal rows are checked."""
    tensors = load_file(adapter_dir / WEIGHTS_FILE)
    tensors[name] = change(tensors.get(name))
    save_file({name: t for name, t in tensors.items() if t is not None}, adapter_dir / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=message):
        _ = find_adapter(str(adapter_dir)).tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"method": "lora"}, r"not a braces adapter[^\n]*\n.*also accepts adapters of peft"),
        ({"colour": "red"}, "unknown key `colour`"),
        ({"r": None}, "required field r"),
    ],
)
def test_a_config_of_another_format_is_refused(adapter_dir, change, message):
    """Unknown keys are errors, as missing keys are."""
    path = adapter_dir / CONFIG_FILE
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ModelError, match=message):
        read_config(adapter_dir)
