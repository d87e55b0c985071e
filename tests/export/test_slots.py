"""A base with slots has the base's logits; its record."""

from pathlib import Path
from typing import Any

import pytest
import torch

from braces_cli.core.errors import ModelError
from braces_cli.core.options import LoadOptions
from braces_cli.export.run import Request
from braces_cli.export.slots import export_slots
from tests.core.architectures import tiny
from tests.export.columns import write_slotted
from tests.export.conftest import save_base
from tests.export.models import names


def test_an_architecture_without_biases_takes_adapters_and_no_attributes(tmp_path: Path) -> None:
    slots, _ = write_slotted(tiny("musicgen"), tmp_path, torch.randint(3, 96, (4, 8)))
    assert slots.constant is None
    assert slots.rank == (slots.wider - slots.width) // 2


def test_a_base_that_takes_no_slots_is_refused(options: LoadOptions, tmp_path: Path, braces: Any) -> None:
    """Qwen3 has no biases and is not a Llama; a dry run prints the reason, too."""
    base = save_base(tmp_path / "base", "qwen3")
    words = "cannot take slots: its gated FFN has no biases"
    with pytest.raises(ModelError, match=words) as caught:
        export_slots(Request(base, None, options, tmp_path / "out"), 8)
    assert "braces export code" in str(caught.value.hint)
    assert names(tmp_path) == ["base"]
    done = braces("export", "slots", "--model", base, "--dry-run", "--format", "json")
    assert words in done.json["reason"]
