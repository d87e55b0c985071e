"""What braces has written and reads again: any change of a good file is read as what it is, or is an error of ours."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from braces_cli.core.adapter.files import AdapterConfig, parameter_count, read_adapter
from braces_cli.core.attributes.files import list_attributes
from braces_cli.core.attributes.vector import Attribute, load_attributes
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.models.identity import differences
from braces_cli.steering.output import TextsFile
from braces_cli.training.record import Record, read_progress, read_record
from tests.fuzz.budget import attempt, fuzz
from tests.fuzz.inputs import ODD, broken_tensors, changed

GOOD = Path(__file__).parents[1] / "fixtures"
CONFIG = json.loads((GOOD / "adapter" / "adapter_config.json").read_text())
WEIGHTS = (GOOD / "adapter" / "adapter_model.safetensors").read_bytes()
ATTRIBUTE = (GOOD / "attributes" / "sunny.safetensors").read_bytes()
PROGRESS = {
    "step": 2, "max_steps": 4, "tokens": 10, "computed": 12, "seconds": 1.5, "loss_sum": 2.5, "loss_open": 0.5,
    "logged": 2,
}  # fmt: skip
RUN = {"settings": {"seed": 0}, "command": ["braces"], "data": "x", "base": None, "progress": PROGRESS, "result": None}
TEXT = {"prompt": "a", "text": "b", "attributes": {}, "sample": 0, "seed": 0}


@contextmanager
def folder_of(files: dict[str, bytes]) -> Iterator[Path]:
    """A folder of these files, which is gone behind the block."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / file).write_bytes(content)
        yield Path(name)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@fuzz(
    changed(CONFIG),
    examples=tuple(
        ({**CONFIG, key: value},)
        for key, value in (
            ("r", [4]), ("r", 10**30), ("layers", [0, "3"]), ("layers", [3, 0]), ("layers", []), ("fingerprint", {}),
            ("fingerprint", "x"), ("relevance_scale", [1.0, float("inf")]), ("tokenizer", {"vocabulary": 5}),
            ("revision", ["main"]),
            ("base_model_name_or_path", "a\x00b"), ("format_version", "2"), ("attributes", [5]),
        )
    ),
)  # fmt: skip
def test_adapter_config(config: Any) -> None:
    with folder_of({"adapter_config.json": as_json(config), "adapter_model.safetensors": WEIGHTS}) as folder:
        stored, error = attempt(lambda: read_adapter("name", folder), ModelError)
        if error:
            assert str(folder) in error.where
            return
        assert isinstance(stored.config, AdapterConfig)
        assert parameter_count(stored.config) > 0
        assert isinstance(differences(stored.config.fingerprint, CONFIG["fingerprint"]), list)
        attempt(lambda: stored.tensors, ModelError)


@fuzz(broken_tensors(WEIGHTS), examples=((b"",), (b"\x80\x04.",), (struct.pack("<Q", 1 << 40) + b"{}",)))
def test_adapter_weights(content: bytes) -> None:
    with folder_of({"adapter_config.json": as_json(CONFIG), "adapter_model.safetensors": content}) as folder:
        tensors, error = attempt(lambda: read_adapter("name", folder).tensors, ModelError)
    assert error or all(tensor.isfinite().all() for tensor in tensors.values())


def _notes(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


HEADER, DATA = _notes(ATTRIBUTE)
NOTES = {
    key: value if key in ("format", "format_version") else json.loads(value)
    for key, value in HEADER["__metadata__"].items()
}


def _with_notes(notes: Any) -> bytes:
    if isinstance(notes, dict):
        notes = {key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()}
    header = json.dumps({**HEADER, "__metadata__": notes}).encode()
    return struct.pack("<Q", len(header)) + header + DATA


@fuzz(st.one_of(changed(NOTES).map(_with_notes), broken_tensors(ATTRIBUTE)), examples=((_with_notes({}),), (b"",)))
def test_attribute_file(content: bytes) -> None:
    good = NOTES["fingerprint"]
    base = SimpleNamespace(fingerprint=lambda ffns: good)
    session: Any = SimpleNamespace(base=base, ffns=[SimpleNamespace(layer=layer) for layer in NOTES["layers"]])
    with folder_of({"sunny.safetensors": content}) as folder:
        rows, error = attempt(lambda: list_attributes(folder, None), ModelError)
        assert error or all(isinstance(row["name"], str) for row in rows)
        loaded, error = attempt(lambda: load_attributes(folder / "sunny.safetensors", session), ModelError)
    for attribute in (loaded or {}).values():
        assert isinstance(attribute, Attribute)
        assert attribute.state.shape == (len(NOTES["layers"]), good["hidden_size"])
        assert attribute.state.dtype == torch.float32


@fuzz(changed(RUN), examples=(({**RUN, "settings": [[]]},), ({**RUN, "progress": {}},), ({},)))
def test_record_of_a_run(value: Any) -> None:
    with folder_of({"checkpoint-2/run.json": as_json(value)}) as folder:
        record, error = attempt(lambda: read_record(folder / "checkpoint-2"), ModelError)
        assert error or isinstance(record, Record)
        progress, error = attempt(lambda: read_progress(folder / "checkpoint-2"), ModelError)
    assert error or progress["step"] == 2


@fuzz(
    st.lists(changed(TEXT), min_size=1, max_size=3),
    changed({"model": "m", "seed": 0, "batch_size": 2, "attributes": []}) | ODD,
    examples=(([TEXT], {"batch_size": []}), ([{**TEXT, "sample": "x"}], {}), ([TEXT], [])),
)
def test_texts_that_are_resumed(rows: list[Any], recorded: Any) -> None:
    files = {
        "texts.jsonl": b"".join(as_json(row) + b"\n" for row in rows),
        "texts.jsonl.settings.json": as_json(recorded),
    }
    with folder_of(files) as folder:
        path = folder / "texts.jsonl"
        settings = {"model": "m", "seed": 0, "attributes": []}
        texts, error = attempt(lambda: TextsFile(path, settings, 2, resume=True, overwrite=False), BracesError)
        assert error or texts.rows == len(rows)
