"""Each command builds its settings, loads its model and finds the FFNs once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from braces_cli.core import config
from braces_cli.core.adapter.model import attach
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.load import tokenizer_hashes
from braces_cli.training.settings import TrainSettings

COUNTED: dict[str, Callable[..., Any]] = {
    "settings built": config.build,
    "settings resolved": TrainSettings.resolve,
    "adapter attached": attach,
    "tokenizer loaded": AutoTokenizer.from_pretrained,
    "tokenizer hashed": tokenizer_hashes,
    "weights loaded": AutoModelForCausalLM.from_pretrained,
    "shape built": AutoModelForCausalLM.from_config,
    "FFNs found": find_ffns,
}


COMMANDS = {
    "train": "--data ROWS --max-steps 2 --rank 4 --output-dir OUT",
    "steer": "--adapter ADAPTER --attribute positive --s 2 --prompt the --max-new-tokens 2",
    "eval": "--adapter ADAPTER --attribute positive --tasks perplexity --task-data perplexity=ROWS --output-dir OUT",
    "merge": "--adapter ADAPTER --output-dir OUT",
}
NEEDED = {"settings built", "adapter attached", "tokenizer loaded", "weights loaded", "FFNs found"}
# Training first builds the base without weights, and checks the settings before the weights are loaded.
LIMITS = {"train": {"FFNs found": 2}}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_step_happens_once(command: str, braces: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Calls are counted under whichever name a module imported the function."""
    codes: dict[CodeType, str] = {getattr(f, "__func__", f).__code__: name for name, f in COUNTED.items()}
    counts: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in codes:
            counts[codes[frame.f_code]] += 1

    rows, words = tmp_path / "rows.jsonl", COMMANDS[command]
    rows.write_text('{"text": "the film is good and the end is sad"}\n' * 4, encoding="utf-8")
    for name, place in {"ROWS": rows, "ADAPTER": adapter_dir, "OUT": tmp_path / "out"}.items():
        words = words.replace(name, str(place))
    sys.setprofile(note)
    try:
        outcome = braces(command, "--model", model_dir, *words.split())
    finally:
        sys.setprofile(None)
    assert outcome.code == 0, outcome.err
    assert counts.keys() >= NEEDED
    limits = dict.fromkeys(COUNTED, 1) | LIMITS.get(command, {})
    assert {name: count for name, count in counts.items() if count > limits[name]} == {}
