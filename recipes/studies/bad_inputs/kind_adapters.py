"""Bad inputs: adapter folders and attribute files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mutate import (
    HOSTILE,
    Context,
    break_file,
    break_tensors,
    case,
    change_json,
    edit_tensors,
    pickled,
    put,
    read_safetensors,
    write_safetensors,
)
from sandbox import Case

_INF = float("inf")
# Values of `adapter_config.json` that no adapter can have, by key; None stands for null.
_CONFIG: dict[str, tuple[Any, ...]] = {
    "base_model_name_or_path": (5, None, [], {}, True, ["a"], ""),
    "r": (0, -1, "8", 1.5, None, True, [], {}, 10**9, 10**30, float("nan"), [4]),
    "layers": ("0,1", None, [0, "1"], [0, 0], [-1, 0], [0.5, 1], [0, 99], [[0], [1]], {}, 5, [0, 10**20], [None, 1],
               [True, 0], {"0": 1}, [0, {}]),
    "fingerprint": (None, [], "x", {}, 5, [{}], True, {"a": 1}),
    "fingerprint.hidden_size": (None, "32", -1, 0, 1.5, [], {}, 10**30, 31),
    "fingerprint.layers": (None, "2", -1, [], {}, 10**30, 3),
    "fingerprint.value_vectors": (None, "52", -1, [], {}, [[]], ["a", "b"], [52], [{}, {}], 5),
    "fingerprint.model_type": (None, 5, [], {}, "other"),
    "fingerprint.sha256": (5, [], {}, True),
    "revision": (5, [], {}, True, ["main"]),
    "tokenizer": (None, "x", [], 5, {"vocabulary": 5}, {"vocabulary": []}, ["a"]),
    "training": (None, "x", [], 5, [1]),
    "attributes": ("positive", None, [5], {}, [None], [[]], 7, ["unknown"], {"a": 1}),
    "scales": ("x", None, [1], [0, 0], [-1, 1], [_INF, 1], ["1", "1"], {}, 5, [None, 1], [True, []]),
    "versions": ("x", [], None, 5, ["torch"]),
    "format_version": (3, "2", None, [], {}, -1, 10**30, 1.5),
    "method": ("lora", None, 5, [], {}, "Braces"),
    "relevance": ("x", 5, None, [], {}, ["paper"], True, ""),
}  # fmt: skip
_NEEDED = ("base_model_name_or_path", "r", "layers", "fingerprint", "format_version", "method")


def _commands(c: Context, adapter: Any) -> tuple[list[Any], Any]:
    """A command that reads the adapter, and its exit codes where the adapter cannot be used."""
    steer = ["steer", "--adapter", adapter, "--prompt", "the film", "--max-new-tokens", "2", "--device", "cpu"]
    of_rows = f"perplexity={c.good.rows}"
    return c.pick([
        (["inspect", "--adapter", adapter], 4),
        (["inspect", "--adapter", adapter, "--format", "json"], 4),
        (steer, 4),
        ([*steer, "--attribute", "positive", "--s", "1", "--format", "json"], 4),
        (["merge", "--adapter", adapter, "--output-dir", "out"], 4),
        (["eval", "--adapter", adapter, "--tasks", "perplexity", "--task-data", of_rows, "--device", "cpu"], 4),
        (["eval", "--adapter", adapter, "--model", c.good.model, "--tasks", "perplexity", "--task-data", of_rows], 4),
        (["inspect", "diff", c.good.adapter, adapter], 4),
        (["inspect", "report", "--adapter", adapter, "--output", "out.html"], 4),
        (["inspect", "values", "--adapter", adapter, "--layers", "0", "--index", "0"], 4),
        (["inspect", "find", "film", "--adapter", adapter], 4),
        (["inspect", "trace", "the film", "--adapter", adapter], 4),
        (["train", "--adapter", adapter, "--data", c.good.rows, "--max-steps", "1", "--output-dir", "out"], 4),
        (["train", "--adapter", adapter, "--data", c.good.rows, "--check"], (0, 4)),
        # What cannot be planned is said in the plan.
        (["merge", "--adapter", adapter, "--output-dir", "out", "--dry-run"], (0, 4)),
        (["train", "--adapter", adapter, "--data", c.good.rows, "--dry-run"], (0, 4)),
        (["attr-build", "--list", "--adapter", adapter], (0, 4)),
    ])  # fmt: skip


def adapters(c: Context) -> Case:
    """An adapter folder of which one thing is wrong."""
    source = c.pick([c.good.adapter, c.good.adapter, c.good.signed, c.good.conditioned])
    folder = c.copy(source, "adapter")
    name: Any = c.pick([folder, "adapter", "./adapter"])
    args, codes = _commands(c, name)
    outputs = ("out", "out.html")
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    way = c.pick(["value", "value", "value", "value", "random", "missing", "unknown", "file", "tensors", "edited",
                  "edited", "pickle", "folder", "hostile name"])  # fmt: skip
    if source == c.good.conditioned and args[0] == "train":
        codes = (0, 2, 4)  # it is trained further with attributes only
    if "merge" in args and "--dry-run" not in args and way in ("random", "edited"):
        # A merge that succeeds takes as long as a hundred other cases.
        args, codes = [*args, "--dry-run"], (0, 4)
    value = json.loads(config.read_text())
    if way in ("value", "missing", "unknown", "random"):
        return _config(c, args, codes, config, value, way)
    if way == "file":
        what, more = break_file(c, config)
        return case(args, codes, f"config: {what}", outputs=outputs, **more)
    if way == "tensors":
        what, more = break_tensors(c, tensors)
        return case(args, _loose(codes, args), f"tensors: {what}", outputs=outputs, **more)
    if way == "edited":
        kind = c.pick(["nan", "inf", "-inf", "shape", "dtype", "missing", "extra", "transposed", "zeros", "huge"])
        edited = edit_tensors(c, tensors, kind)
        harmless = "gate" in edited or "condition" in edited
        codes = (0, 2, 4) if kind in ("zeros", "huge", "transposed") and harmless else codes
        return case(args, _loose(codes, args), f"tensors: {kind}", outputs=outputs)
    if way == "pickle":
        # A pickle beside the tensors, or in their place.
        (folder / c.pick(["adapter_model.bin", "pytorch_model.bin", "training_args.bin"])).write_bytes(pickled())
        if c.rng.random() < 0.5:
            tensors.unlink()
            return case(args, _loose(codes, args), "a pickle in place of tensors", outputs=outputs)
        return case(["inspect", "--adapter", folder], 0, "a pickle beside")
    if way == "folder":
        wrong = c.pick(
            ["nothing", "", "rows.jsonl", "no/such", "a" * 300, c.good.model, c.good.rows, c.good.attributes]
        )
        args = [wrong if word is name else word for word in args]
        # Beside an adapter, `inspect diff` takes a model for a wrong option.
        option = wrong == "" or (wrong == c.good.model and "diff" in args)
        return case(args, (2, 4) if option else _loose(codes, args), "no adapter", outputs=outputs)
    renamed = folder.rename(c.folder / c.pick([text for text in HOSTILE if 0 < len(text) < 200 and "/" not in text]))
    args = [renamed if word is name else word for word in args]
    config = renamed / "adapter_config.json"
    config.write_text(json.dumps({**value, "r": "x"}))
    return case(args, codes, "hostile folder name", outputs=outputs)


def _config(c: Context, args: list[Any], codes: Any, path: Path, value: dict[str, Any], way: str) -> Case:
    outputs = ("out", "out.html")
    if way == "value":
        key = c.pick(sorted(_CONFIG))
        new = c.pick(_CONFIG[key])
        value = put(value, tuple(key.split(".")), new)
        what = f"{key} = {json.dumps(new)[:40]}"
        if key == "base_model_name_or_path" and new == "":
            codes = (0, 4)
        if key.startswith("fingerprint.") or key == "attributes":
            codes = _loose(codes, args)
    elif way == "missing":
        key = c.pick(_NEEDED)
        del value[key]
        what = f"{key} missing"
    elif way == "unknown":
        value[c.pick(["Rank", "peft_type", "x", *HOSTILE[:12]])] = 1
        what = "an unknown key"
    else:
        value, what = change_json(c, value)
        # What is recorded only may hold anything of its type.
        codes = tuple(sorted({0, *((codes,) if isinstance(codes, int) else codes)}))
    path.write_text(json.dumps(value))
    return case(args, codes, f"config: {what}", outputs=outputs)


def _loose(codes: Any, args: list[Any]) -> Any:
    """Commands that read the config alone may succeed where only the tensors are wrong."""
    config_alone = "--list" in args or "--check" in args or "--dry-run" in args or args[:2] == ["inspect", "values"]
    known = {codes} if isinstance(codes, int) else set(codes)
    return {0, 4} | known if config_alone else codes


# The metadata of an attribute file: JSON in text, and values that no file of ours can have.
_HEADER: dict[str, tuple[Any, ...]] = {
    "attributes": (None, [], "x", 5, {"bright": 5}, {"bright": [5]}, {"bright": None}, {"other": ["x"]}, ["bright"],
                   {}, {"bright": {"a": 1}}),
    "layers": (None, "0", {}, [0], ["0", "1"], [0, 0], [-1, 0], [[0], [1]], [0, 99], [0.5, 1], [], [0, 1, 2],
               [None, 1]),
    "fingerprint": (None, [], "x", 5, {}, {"hidden_size": "x"}, True),
    "details": (None, [], "x", 5, {"bright": 5}, {"bright": []}, {"bright": {"pooling": 5}},
                {"bright": {"difference": "x"}}, {"bright": {"examples": "x"}}, {"bright": {"base": 5}},
                {"bright": {"residual": {}}}, {"bright": {"difference": [None]}}),
    "format_version": ("9", "x", ""),
}  # fmt: skip


def _users(c: Context, folder: Any) -> tuple[list[Any], bool]:
    """A command that uses the attribute `bright` of a folder, and whether it reads the tensors."""
    model = ["--model", c.good.model, "--device", "cpu"]
    use = ["--attributes", folder, "--attribute", "bright"]
    steer = ["steer", *model, *use, "--prompt", "the film", "--max-new-tokens", "2"]
    return c.pick([
        (steer, True),
        ([*steer, "--s", "0", "--format", "json"], True),
        (["attr-build", "--list", "--output-dir", folder], False),
        (["attr-build", "--list", "--output-dir", folder, "--format", "json"], False),
        (["inspect", "find", *model, *use], True),
        (["eval", *model, *use, "--tasks", "sentiment", "--task-data", f"sentiment={c.good.prompts}",
          "--max-new-tokens", "2"], True),
    ])  # fmt: skip


def attributes(c: Context) -> Case:
    """An attribute file of which one thing is wrong."""
    folder = c.copy(c.good.attributes, "attributes")
    path = folder / "bright.safetensors"
    args, reads = _users(c, c.pick([folder, "attributes"]))
    outputs = ("out", "out.html")
    way = c.pick(["header", "header", "header", "missing", "not JSON", "tensors", "edited", "edited", "edited", "place",
                  "hostile"])  # fmt: skip
    if way in ("header", "missing", "not JSON", "hostile"):
        header, data = read_safetensors(path)
        notes = header["__metadata__"]
        key = c.pick(sorted(_HEADER))
        codes: Any = 4 if key in ("attributes", "layers", "fingerprint") else (0, 4)
        what = f"header {key} {way}"
        if way == "header":
            new = c.pick(_HEADER[key])
            notes[key] = new if key == "format_version" else json.dumps(new)
            what = f"header: {key} = {notes[key][:40]}"
            if not reads and (key != "attributes" or new in ({}, {"other": ["x"]})):
                codes = (0, 4)
            if key == "attributes" and new in ({"other": ["x"]}, {}):
                codes = (0, 2, 4)
        elif way == "missing":
            notes.pop(key, None)
        elif way == "not JSON":
            notes[key] = c.pick(["", "{", "[" * 20000, "\x1b[31m", "nan", "'x'"])
        else:
            text = c.pick(HOSTILE)
            notes["attributes"] = json.dumps({"bright": [text], text: [text]})
            codes = (0, 4)
        write_safetensors(path, header, data)
        return case(args, codes, what, outputs=outputs)
    if way == "tensors":
        what, more = break_tensors(c, path)
        opened = what in ("a pickle", "a folder", "a symlink loop", "no permission", "empty", "header text")
        return case(args, (2, 4) if reads or opened else (0, 4), f"file: {what}", outputs=outputs, **more)
    if way == "edited":
        kind = c.pick(["nan", "inf", "-inf", "shape", "dtype", "missing", "transposed", "zeros", "huge", "extra"])
        name = edit_tensors(c, path, kind, [f"bright.{part}" for part in ("hidden", "reference", "residual", "scale")])
        unread = kind in ("zeros", "huge", "extra") or (kind == "nan" and "--s" in args)
        return case(args, (0, 4) if unread or not reads else 4, f"tensor {name}: {kind}", outputs=outputs)
    # What exists under the name of the folder or file and cannot be read is an error.
    goal = c.pick([folder, path])
    if goal is folder:
        for each in folder.iterdir():
            each.unlink()
        folder.rmdir()
    what, more = break_file(c, goal, ["a symlink loop", "a dangling link", "a FIFO", "no permission", "empty"])
    return case(args, (2, 4), f"{'folder' if goal is folder else 'file'}: {what}", outputs=outputs, **more)
