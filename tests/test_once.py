"""Each command builds its settings, downloads and loads its model and adapter, and finds the FFNs once."""

import sys
from collections import Counter
from collections.abc import Callable
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
def test_each_step_happens_once(command, braces, model_dir, adapter_dir, tmp_path, monkeypatch, in_process):
    """Calls are counted under whichever name a module imported the function; the adapter is on a hub."""

    def download(name: str, **options: Any) -> str:
        return str(adapter_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    codes: dict[CodeType, str] = {getattr(f, "__func__", f).__code__: name for name, f in COUNTED.items()}
    codes[download.__code__] = "adapter downloaded"
    counts: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in codes:
            counts[codes[frame.f_code]] += 1

    rows, words = tmp_path / "rows.jsonl", COMMANDS[command]
    rows.write_text('{"text": "the film is good and the end is sad"}\n' * 4, encoding="utf-8")
    for name, place in {"ROWS": rows, "ADAPTER": "someone/adapter", "OUT": tmp_path / "out"}.items():
        words = words.replace(name, str(place))
    sys.setprofile(note)
    try:
        outcome = braces(command, "--model", model_dir, *words.split())
    finally:
        sys.setprofile(None)
    assert outcome.code == 0, outcome.err
    assert counts.keys() >= NEEDED
    assert ("adapter downloaded" in counts) == (command != "train")
    limits = LIMITS.get(command, {})
    assert {name: count for name, count in counts.items() if count > limits.get(name, 1)} == {}
