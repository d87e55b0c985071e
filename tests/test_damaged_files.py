"""Damaged files of every kind that braces reads: one error of the kind's class, with the file, the key and a hint."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from braces_cli.core.adapter.files import read_config
from braces_cli.core.attributes.files import read_header
from braces_cli.core.errors import BracesError, DataError, ModelError
from braces_cli.core.files import write_tensors
from braces_cli.evaluation.results import Store
from braces_cli.evaluation.systems import find_eval_adapter
from braces_cli.export.checkpoint import read_record as read_merge
from braces_cli.export.slots import read_slots
from braces_cli.steering.output import TextsFile
from braces_cli.training import checkpoint as checkpointing

SIZES = {"model_type": "llama", "layers": 2, "hidden_size": 8, "value_vectors": [16, 16]}
ADAPTER = {
    "format_version": 1, "method": "braces", "base_model_name_or_path": "base", "revision": None,
    "r": 2, "layers": [0, 1], "base": SIZES, "tokenizer": {"vocabulary": "a", "chat_template": None},
    "training": {}, "attributes": [], "relevance_to": "input", "relevance_scale": [1.0, 2.0],
    "versions": {"torch": "2"},
}  # fmt: skip
LIKELIHOOD = {"nll": 1.5, "tokens": 3}
PROGRESS = {
    "step": 2, "max_steps": 4, "tokens": 5, "computed": 6, "seconds": 0.5, "loss_sum": 1.0, "loss_open": 0.0,
    "logged": 2,
}  # fmt: skip
RESULT = {
    "output_dir": "out", "method": "braces", "trainable_parameters": 1, "condition_parameters": 0,
    "total_parameters": 9, "trainable_percent": 1.0, "steps": 4, "epochs": 1.0, "train_loss": 2.0,
    "base_eval_loss": None, "base_eval_perplexity": None, "eval_loss": None,
    "eval_perplexity": None, "seconds": 1.0, "tokens": 9,
    "tokens_per_second": 9.0, "peak_memory": 1, "rows": 1, "rows_truncated": 0, "rows_dropped": 0,
    "packed": False, "padding_share": 0.0,
}  # fmt: skip
RECORD = {"settings": {}, "command": ["braces"], "data": {}, "base": LIKELIHOOD, "progress": PROGRESS, "result": None}
METRIC = {"value": 1.0, "stderr": None, "n": 3}
PART = {
    "results": {"task": {"acc": {**METRIC, "documents": {"0": 1.0}, "units": {"0": 2.0}, "better": True}}},
    "shots": {"task": 0}, "versions": {}, "batch_sizes": [1],
}  # fmt: skip
SLOTS = {
    "format_version": 1, "model": "m", "revision": None, "base": SIZES, "architecture": "Llama",
    "dtype": "float32", "width": 8, "wider": 16, "gated": True, "activation": [1.0, 2.0], "constant": None, "first": 8,
    "offset": 0, "rows": 16, "layers": {"0": ["up", "down"]}, "versions": {},
}  # fmt: skip
MERGE = {
    "model": "m", "adapter": "a", "dtype": "float32", "attributes": {"x": 1.0}, "layers": "0-1", "case": "a",
    "architecture": "Llama", "neurons_added": 4,
}  # fmt: skip


def new_optimizer() -> tuple[Any, Any]:
    """An optimizer and a schedule with one parameter."""
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0)


def optimizer(folder: Path) -> None:
    state = {f"0.{name}": torch.zeros(2) for name in ("exp_avg", "exp_avg_sq")} | {"0.step": torch.tensor(2.0)}
    if not (folder / "optimizer.safetensors").exists():
        write_tensors(folder / "optimizer.safetensors", state)
    checkpointing.restore_optimizer(folder, *new_optimizer())


def manifest(folder: Path) -> None:
    checkpointing.newest_intact(folder.parent)


def texts(folder: Path) -> None:
    row = {"prompt": "a", "text": "b", "attributes": {}, "sample": 0, "seed": 0}
    (folder / "texts.jsonl").write_text(json.dumps(row) + "\n")
    TextsFile(folder / "texts.jsonl", {"seed": 0}, 1, resume=True, overwrite=False)


@dataclass
class FileKind:
    """Name and valid content of a file, and the function that reads it in a folder."""

    name: str
    content: Any
    read: Callable[[Path], Any]
    prepare: Callable[[Path], object] = lambda folder: None  # writes the other files of the folder
    error: type[BracesError] = ModelError
    shared: bool = False  # other programs write it, too: lone surrogates and other keys are accepted
    free: str = "$^"  # pattern of the places whose values are not typed


ADAM = new_optimizer()
SCHEDULE = {"groups": ADAM[0].state_dict()["param_groups"], "scheduler": ADAM[1].state_dict(), "scaler": None}
KINDS = {
    "adapter": FileKind("adapter_config.json", ADAPTER, read_config, shared=True),
    "adapter of peft": FileKind(
        "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "base"}, find_eval_adapter,
        lambda folder: write_tensors(folder / "adapter_model.safetensors", {"a": torch.zeros(1)}), shared=True,
    ),
    "run": FileKind("run.json", RECORD, checkpointing.read_record, free="progress."),
    "progress": FileKind("run.json", RECORD, checkpointing.read_progress),
    "result of a run": FileKind(
        "run.json", {**RECORD, "result": RESULT}, lambda folder: checkpointing.finished(folder, {}),
        lambda folder: (folder / "adapter_config.json").write_text("{}"), free="progress.",
    ),
    "schedule": FileKind("optimizer.json", SCHEDULE, optimizer, free="."),
    "generators": FileKind("rng.json", [checkpointing.rng_state()], checkpointing.restore_rng, free="0.cuda"),
    "manifest": FileKind("manifest.json", {"step": 2, "sha256": {}}, manifest),
    "part of a result": FileKind(
        "parts/base/unit.json", PART, lambda folder: Store(folder).load("base", "unit"),
    ),
    "settings of an evaluation": FileKind(
        "run.json", {"log_samples": False}, lambda folder: Store(folder).begin({}, resume=True), free=".",
    ),
    "slots": FileKind("braces_slots.json", SLOTS, read_slots, free="versions"),
    "merge": FileKind("braces_merge.json", MERGE, read_merge),
    "texts": FileKind("texts.jsonl.settings.json", {"seed": 0, "batch_size": 1}, texts, error=DataError, free="."),
}  # fmt: skip

# tests/core/test_schema.py has more damaged texts.
TEXTS = (b"", b'{"a": [1, 2', b"[1]", b"[" * 100_000, bytes(range(256)))


def damaged(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Copies of a JSON value, each with `[[]]` at one place, which is valid nowhere; with the place."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        for place, changed in (((*path, str(key)), [[]]), *damaged(item, (*path, str(key)))):
            copy = value.copy()
            copy[key] = changed
            yield place, copy


@pytest.mark.parametrize("name", KINDS)
def test_damaged_file(name: str, tmp_path: Path) -> None:
    """Text of no document, and a value of another type at each place, where the error has the key."""
    kind = KINDS[name]
    folder = tmp_path / "checkpoint-2"
    path = folder / kind.name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind.prepare(folder)

    def read_error(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(BracesError) as caught:
            kind.read(folder)
        error = caught.value
        assert isinstance(error, kind.error), f"{content[:400]!r}: {error!r}"
        assert path.name in str(error.where), f"{content[:400]!r}: {error.where}"
        assert error.hint
        assert len(error.message) < 400
        return f"{error.where} {error.message}".replace("_", " ")

    path.write_text(json.dumps(kind.content))
    kind.read(folder)  # control
    for text in TEXTS if kind.shared else (*TEXTS, b'{"a": "\\ud800"}'):
        read_error(text)
    for place, content in damaged(kind.content):
        if not re.match(kind.free, ".".join(place)):
            shown = read_error(json.dumps(content, indent=2).encode())
            # For values that torch or Python rejects, the error has the file only.
            found = any(key.replace("_", " ") in shown for key in place)
            assert found or "the checkpoint is damaged" in shown, f"{place}: {shown}"


HEADER = {
    "format_version": "1", "attributes": '{"x": ["a"]}', "layers": "[0, 1]", "sizes": json.dumps(SIZES),
    "details": '{"x": {"base": "b", "pooling": "mean", "examples": 0, "difference": [1.0], "residual": [1.0]}}',
}  # fmt: skip


def test_header_of_attributes(tmp_path: Path) -> None:
    """Each value is a JSON text; a file that is not safetensors is an error before the sizes in it are allocated."""
    path = tmp_path / "x.safetensors"
    tensors = {"x.hidden": torch.zeros(2, 8)}

    def read_error() -> str:
        with pytest.raises(ModelError, match=re.escape(path.name)) as caught:
            read_header(path)
        return f"{caught.value.where} {caught.value.message}".replace("_", " ")

    write_tensors(path, tensors, HEADER)
    assert read_header(path).layers == [0, 1]
    bad = {
        "attributes": ["", "{", "5", "[]", '{"x": "a"}', '{"x": [5]}', "[" * 5000],
        "layers": ["", "x", "{}", "[0]", "[1, 0]", "[0, 0]", "[0, null]", "[0, 1.5]", "[0, -1]", '"[0, 1]"'],
        "sizes": ["", "[]", "{}", json.dumps({**SIZES, "hidden_size": "x"}), "NaN"],
        "details": ["", "[]", '{"x": 5}', '{"x": {"pooling": "none"}}', '{"x": {"examples": -1}}'],
        "format_version": ["2", ""],
    }
    for key, value in ((key, value) for key, values in bad.items() for value in values):
        write_tensors(path, tensors, {**HEADER, key: value})
        shown = read_error()
        assert key.replace("_", " ") in shown, f"{key} = {value[:40]}: {shown}"
    for data in (b"", b"x", b"\xff" * 8, (10**9).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]",
                 (5).to_bytes(8, "little") + b'{"a":', (12).to_bytes(8, "little") + b'{"a": [1, 2]'):  # fmt: skip
        path.write_bytes(data)
        read_error()
