"""Bad inputs: rows of data files, and YAML configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mutate import DEEP, HOSTILE, Context, break_file, case
from sandbox import CANARY, Case

# What reads a file of rows, with the columns that it needs.
_READERS: dict[str, Callable[[Context, Any], tuple[list[Any], tuple[str, ...]]]] = {
    "train --check": lambda c, path: (["train", "--check", "--model", c.good.model, "--data", path], ("text",)),
    "train --check --attribute-field": lambda c, path: (
        ["train", "--check", "--model", c.good.model, "--data", path, "--attribute-field", "attribute"],
        ("text", "attribute"),
    ),
    "train": lambda c, path: (
        ["train", "--model", c.good.model, "--device", "cpu", "--data", path, "--max-steps", "1", "--output-dir",
         "out"],
        ("text",),
    ),
    "attr-build --examples": lambda c, path: (
        ["attr-build", "--model", c.good.model, "--attribute", "x", "--examples", path, "--output-dir", "out"],
        ("text",),
    ),
    "eval": lambda c, path: (
        ["eval", "--model", c.good.model, "--tasks", "perplexity", "--task-data", f"perplexity={path}"],
        ("text",),
    ),
    "eval sentiment": lambda c, path: (
        ["eval", "--model", c.good.model, "--tasks", "sentiment", "--task-data", f"sentiment={path}", "--limit", "1",
         "--max-new-tokens", "2", "--attribute", "positive"],
        ("prompt",),
    ),
    "inspect clamp": lambda c, path: (
        ["inspect", "clamp", "0:1=p50", "--model", c.good.model, "--prompt", "the film", "--data", path],
        ("text",),
    ),
    "steer --prompts": lambda c, path: (
        ["steer", "--model", c.good.model, "--max-new-tokens", "2", "--prompts", path], ("prompt",),
    ),
    "steer --scorer fit:": lambda c, path: (
        ["steer", "--model", c.good.model, "--max-new-tokens", "2", "--prompt", "the", "--attribute", "positive",
         "--sweep", "0:1:1", "--scorer", f"fit:{path}"],
        ("text", "label"),
    ),
}  # fmt: skip
_DEEP_JSON = "[" * DEEP + "]" * DEEP
_BAD_LINES = (
    '{"text": "x"', "{'text': 'x'}", '{"text": NaNa}', "[1, 2", '{"text": "x",}', "text", '{"text": "\\ud8"}', "\0",
    '{"text": "x"} {"text": "y"}', '{"text": ' + _DEEP_JSON + "}", '{"a":' * DEEP + "1" + "}" * DEEP, "]", '"',
)  # fmt: skip
_NOT_ROWS = ("5", "null", "true", '"text"', "[]", '["text"]', "[[1]]", "1e999", "NaN")
_NOT_TEXT = (5, None, True, 1.5, [], {}, ["a"], {"a": "b"}, [[]])


def rows(c: Context) -> Case:
    """One bad row, or a bad file of rows, read by one of the commands that read rows."""
    reader = c.pick(sorted(_READERS))
    suffix = c.pick([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"])
    path = c.folder / f"rows{suffix}"
    args, columns = _READERS[reader](c, path)
    good = [dict.fromkeys(columns, "the film is good" if i % 2 else "a sad end") for i in range(6)]
    for i, row in enumerate(good):
        for column in ("label", "attribute"):
            if column in row:
                row[column] = "positive" if i % 2 else "negative"
    make = {".jsonl": _json_lines, ".json": _json, ".csv": _cells, ".tsv": _cells, ".txt": _text, ".parquet": _parquet}
    codes, what, more = make[suffix](c, path, good, columns[0])
    if suffix == ".txt" and columns != ("prompt",) and codes != 3:
        codes = (0, 3)
    if reader in ("steer --prompts", "eval sentiment") and suffix == ".txt":  # prompts are lines
        codes = (0, 3)
    if reader in ("steer --prompts", "attr-build --examples") and what == "no permission":
        codes = (2, 3)  # refused with the words of the call, before anything is read
    if reader.startswith("steer --prompts") and suffix == ".json":
        codes = (0, 3)
    fmt = c.pick([[], [], ["--format", "json"]])
    return case([*args, *fmt], codes, f"{suffix} {what}", outputs=("out",), **more)


def _json_lines(c: Context, path: Any, good: list[dict[str, Any]], column: str) -> tuple[Any, str, dict[str, Any]]:
    lines = [json.dumps(row) for row in good]
    place = c.rng.randrange(len(lines))
    way = c.pick(["line", "no row", "no text", "missing", "file", "bytes", "surrogate", "hostile", "huge", "key"])
    if way == "line":
        lines[place] = c.pick(_BAD_LINES)
    elif way == "no row":
        lines[place] = c.pick(_NOT_ROWS)
    elif way == "no text":
        lines[place] = json.dumps({**good[place], column: c.pick(_NOT_TEXT)})
    elif way == "missing":
        lines[place] = json.dumps({"other": "x"})
    elif way == "surrogate":
        lines[place] = json.dumps({**good[place], column: f"a {chr(0xD800 + c.rng.randrange(2048))} b"})
    elif way == "hostile":
        lines[place] = json.dumps({**good[place], column: c.pick(HOSTILE)})
    elif way == "huge":
        lines[place] = json.dumps({**good[place], column: "the film " * c.pick([3000, 30000])})
    elif way == "key":
        lines[place] = json.dumps({c.pick(HOSTILE): "x", c.pick(HOSTILE): 5})
    elif way == "file":
        path.write_text("\n".join(lines))
        ways = ["empty", "only white space", "zero bytes", "not JSON", "deep lists", "a pickle", "an HTML page",
                "a folder", "a symlink loop", "a dangling link", "no permission"]  # fmt: skip
        what, more = break_file(c, path, ways)
        return 3, what, more
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if way == "bytes":
        cut = c.rng.randrange(len(content))
        content = content[:cut] + c.pick([b"\xff", b"\xc3(", b"\xed\xa0\x80"]) + content[cut:]
    path.write_bytes(content)
    # Text may be anything; half a surrogate is replaced or refused.
    return (0, 3) if way in ("surrogate", "hostile", "huge") else 3, way, {}


def _json(c: Context, path: Any, good: list[dict[str, Any]], column: str) -> tuple[Any, str, dict[str, Any]]:
    way = c.pick(["file", "not rows", "mixed", "no text", "digits", "other"])
    path.write_text(json.dumps(good))
    if way == "file":
        what, more = break_file(c, path)
        # Nobody writes to a FIFO: it may be refused, but not waited for.
        return 3, what, more
    if way == "digits":
        path.write_text('[{"' + column + '": ' + "9" * 5000 + "}]")
        return 3, way, {}
    value: Any = {
        "not rows": c.pick([5, None, "x", [], [1], [[]], [None], True, [[{"a": 1}]]]),
        "mixed": [*good, c.pick([5, None, "x", []])],
        "no text": [{**good[0], column: c.pick(_NOT_TEXT)}],
        "other": {c.pick(HOSTILE): good},
    }[way]
    path.write_text(json.dumps(value))
    return 3, way, {}


def _cells(c: Context, path: Any, good: list[dict[str, Any]], column: str) -> tuple[Any, str, dict[str, Any]]:
    mark = "\t" if path.suffix == ".tsv" else ","
    table = [list(good[0]), *(list(row.values()) for row in good)]
    way = c.pick(["cells", "fewer", "quote", "header", "bytes", "nul", "long", "file", "hostile"])
    place = c.rng.randrange(1, len(table))
    if way == "cells":
        table[place].append("more")
    elif way == "fewer":
        table[place] = []
    elif way == "header":
        table[0] = [c.pick(HOSTILE) for _ in table[0]]
    elif way == "long":
        table[place][0] = "x" * 200_000
    elif way == "hostile":
        table[place][0] = c.pick(HOSTILE)
    text = "\n".join(mark.join(row) for row in table) + "\n"
    if way == "quote":
        text = text.replace("the", '"the', 1)
    content = text.encode()
    if way == "bytes":
        content = content.replace(b"a sad", b"a \xff sad", 1)
    if way == "nul":
        content = content.replace(b"the", b"t\0e", 1)
    path.write_bytes(content)
    if way == "file":
        what, more = break_file(c, path, ["empty", "not UTF-8", "a folder", "a symlink loop", "no permission"])
        return 3, what, more
    # An empty line is no row; Python reads a NUL in a cell from 3.11 on.
    return 3 if way in ("cells", "quote", "bytes") else (0, 3), way, {}


def _text(c: Context, path: Any, good: list[dict[str, Any]], column: str) -> tuple[Any, str, dict[str, Any]]:
    path.write_text("".join(f"{row[column]}\n" for row in good))
    if c.rng.random() < 0.5:
        ways = ["empty", "only white space", "not UTF-8", "a folder", "a symlink loop", "a dangling link"]
        what, more = break_file(c, path, [*ways, "no permission"])
        return 3, what, more
    path.write_text("\n".join(c.pick(HOSTILE) for _ in range(4)) + "\nthe film\n", newline="")
    return (0, 3), "hostile", {}


def _parquet(c: Context, path: Any, good: list[dict[str, Any]], column: str) -> tuple[Any, str, dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    way = c.pick(["file", "cut", "flip", "types"])
    if way == "types":
        values = c.pick([[1, 2], [[1], [2]], [None, None], [{"a": 1}, {"a": 2}], [b"\xff", b"x"], [1.5, 2.0]])
        pyarrow.parquet.write_table(pyarrow.table({column: values}), path)
        return 3, way, {}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good), path)
    content = path.read_bytes()
    if way == "cut":
        path.write_bytes(content[: c.rng.randrange(1, len(content))])
        return 3, way, {}
    if way == "flip":
        place = c.rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << c.rng.randrange(8))]) + content[place + 1 :])
        return (0, 3), way, {}
    what, more = break_file(c, path)
    return 3, what, more


# Command, good settings, and for some keys values that are certainly wrong.
_BAD_VALUES: dict[str, tuple[Any, ...]] = {
    "max_steps": ("ten", 0, -1, [1], {"a": 1}, 1.5, "1e3"),
    "rank": ("x", 0, -4, [8], {}, 2.5, "0x8"),
    "lr": ("fast", -1, 0, [], "nan", float("inf"), {}),
    "epochs": ("one", -1, 0, [], float("nan"), {}),
    "relevance": ("other", 5, [], {}, True),
    "schedule": ("steps", 5, [], True),
    "data": ({"a": 1}, [{}], [["a"]], 5),
    "output_dir": ([], {}, ["a"]),
    "layers": ("a-b", "9-1", [], {}, "0-"),
    "packing": ("perhaps", 5, [], {}),
    "seed": (-1, "x", [], {}, 1.5),
    "model": ([], {}, ["a"], "no/such/folder", ""),
    "dtype": ("int7", 5, [], {}),
    "check": ("perhaps", [], {}, 7),
    "opposites": ("a", [["a"]], {"a": "b"}, [5]),
    "resume": ("perhaps", [], {}),
}  # fmt: skip
_TEXTS: dict[str, tuple[Any, str]] = {
    "python tag": (2, f"model: !!python/object/apply:os.mkdir [{CANARY}]\n"),
    "python name": (2, "model: !!python/name:os.system\n"),
    "unknown tag": (2, "model: !thing x\n"),
    "bomb": (2, "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))),
    "bomb in a value": (2, "data: [" + "&a [x,x,x,x,x,x,x,x,x]" + "".join(
        f", &{chr(97 + i)} [{','.join([f'*{chr(96 + i)}'] * 9)}]" for i in range(1, 9)) + "]\n"),
    "bomb of merges": (2, "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: *a, y{i}: 1}}\n" for i in range(3))),
    "recursive alias": (2, "data: &a [*a]\n"),
    "duplicate keys": (2, "seed: 1\nseed: 2\n"),
    "duplicate keys with dash": (2, "max_steps: 1\nmax-steps: 2\n"),
    "deep lists": (2, "data: " + "[" * 3000 + "]" * 3000 + "\n"),
    "deep maps": (2, "data: " + "{a: " * 1500 + "1" + "}" * 1500 + "\n"),
    "deep 60": (2, "data: " + "[" * 60 + "]" * 60 + "\n"),
    "a list": (2, "- model\n- data\n"),
    "a word": (2, "model\n"),
    "a number": (2, "5\n"),
    "two documents": (2, "seed: 1\n---\nseed: 2\n"),
    "tabs": (2, "model:\tx\n\tdata: y\n"),
    "unclosed": (2, "data: [a, b\n"),
    "unclosed quote": (2, 'model: "x\n'),
    "unknown key": (2, "modle: x\n"),
    "key a list": (2, "? [a]\n: x\n"),
    "key a map": (2, "? {a: 1}\n: x\n"),
    "key null": (2, "null: x\n"),
    "key a number": (2, "5: x\n"),
    "undefined alias": (2, "model: *a\n"),
    "zero byte": (2, 'model: "a\\0b"\n'),
    "surrogate": (2, 'model: "a\\uD800b"\n'),
    "control": (2, "model: a\x01b\n"),
    "date": (2, "max_steps: 2020-01-01\n"),
    "date of no month": ((0, 2, 4), "model: 2020-13-45\n"),
    "binary": (2, "model: !!binary aGVsbG8=\n"),
    "bad binary": (2, "model: !!binary ====\n"),
    "set": (2, "data: !!set {a, b}\n"),
    "omap": (2, "data: !!omap [a: 1]\n"),
    "huge number": (2, f"seed: {'9' * 5000}\n"),
    "sexagesimal": (2, "max_steps: 1:30:00x\n"),
    "config in config": (2, "config: other.yaml\n"),
    "null document": ((0, 2), "null\n"),
    "empty": ((0, 2), ""),
    "comment": ((0, 2), "# nothing\n"),
}  # fmt: skip


def yaml(c: Context) -> Case:
    """A bad `--config` file of one of several commands."""
    path = c.folder / "config.yaml"
    args: list[Any]
    args, usable = c.pick([
        (["train", "--dry-run", "--config", path], True),
        (["train", "--check", "--model", c.good.model, "--data", c.good.rows, "--config", path], True),
        (["merge", "--dry-run", "--config", path], False),
        (["eval", "--dry-run", "--config", path], False),
        (["steer", "--dry-run", "--config", path], False),
        (["inspect", "values", "--model", c.good.model, "--layers", "0", "--index", "0", "--config", path], False),
    ])  # fmt: skip
    way = c.pick(["text", "text", "text", "value", "value", "file", "hostile", "hostile value"])
    more: dict[str, Any] = {}
    codes: Any = 2
    if way == "text":
        what = c.pick(sorted(_TEXTS))
        codes, text = _TEXTS[what]
        path.write_text(text, newline="")
    elif way == "value" and usable:
        key = c.pick([key for key in sorted(_BAD_VALUES) if key not in ("resume",)])
        value = c.pick(_BAD_VALUES[key])
        what = f"{key} = {json.dumps(value)}"
        codes = (0, 2) if key in ("model", "data", "layers", "output_dir") else 2
        if key in args[-2:] or f"--{key}" in args:
            codes = (0, 2)  # the command line wins, and the value may not be read
        if "--dry-run" not in args and key in ("model", "data", "layers"):
            codes = (0, 2, 3, 4)
        path.write_text(f"{key}: {_yaml(value)}\n")
    elif way == "file":
        path.write_text("seed: 1\n")
        what, more = break_file(c, path)
        codes = (0, 2) if what in ("empty", "only white space", "a truncated file") else 2
    elif way == "hostile value":
        key = c.pick(["model", "adapter", "seed", "format"])
        what = f"{key} hostile"
        path.write_text(f"{key}: {json.dumps(c.pick(HOSTILE))}\n")
        codes = 2 if key in ("seed", "format") else (0, 2, 4)
    else:
        what = "key hostile"
        path.write_text(f"{json.dumps(c.pick(HOSTILE))}: x\n")
    return case(args, codes, what, **more)


def _yaml(value: Any) -> str:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return ".nan" if value != value else ".inf"
    return json.dumps(value)
