"""Bad inputs: text that a terminal, Rich or Markdown would act on, wherever a name or a text can stand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mutate import HOSTILE, Context, case
from sandbox import Case

# Options that take a word.
_FLAGS = ("--device", "--dtype", "--layers", "--revision", "--quantize", "--device-map", "--seed", "--top-p")


def _cpu(c: Context) -> list[Any]:
    return ["--model", c.good.model, "--device", "cpu"]


def _steer(c: Context) -> list[Any]:
    return ["steer", *_cpu(c), "--max-new-tokens", "2"]


def _check(c: Context, path: Any) -> list[Any]:
    return ["train", "--check", "--model", c.good.model, "--data", path]


def _rows(c: Context, row: dict[str, str], *more: str) -> list[Any]:
    path = c.folder / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in ({"text": "the film", "attribute": "x"}, row)))
    return [*_check(c, path), *more]


def _labelled(c: Context, text: str) -> list[Any]:
    return _rows(c, {"text": text, "label": text, "attribute": text}, "--attribute-field", "attribute")


def _folder(c: Context, text: str) -> list[Any]:
    folder = c.copy(c.good.adapter, _name(text))
    return c.pick([["inspect", "--adapter", folder], [*_steer(c), "--prompt", "a", "--adapter", folder]])


def _output(c: Context, text: str) -> list[Any]:
    name = _name(text)
    return c.pick([
        [*_steer(c), "--prompt", "a", "--output", name],
        ["train", *_cpu(c), "--data", c.good.rows, "--max-steps", "1", "--output-dir", name],
        ["inspect", "report", *_cpu(c), "--output", name, "--prompt", text],
        ["recipe", "copy", "small-sentiment", "--output-dir", name],
    ])  # fmt: skip


def _argument(c: Context, text: str) -> list[Any]:
    return c.pick([
        ["inspect", "find", text, *_cpu(c)],
        ["inspect", "trace", text, *_cpu(c)],
        ["inspect", "trace", "the film", *_cpu(c), "--target", text],
        ["inspect", "clamp", text, *_cpu(c), "--prompt", "a"],
        ["inspect", "clamp", "0:1=1", *_cpu(c), "--prompt", text, "--token", text],
        ["inspect", "diff", text, text],
    ])  # fmt: skip


def _command(c: Context, text: str) -> list[Any]:
    return c.pick([[text], ["inspect", text], ["train", f"--{text}"], ["recipe", text, "x"]])


def _file_name(c: Context, text: str) -> list[Any]:
    path = c.folder / f"{_name(text)}.jsonl"
    path.write_text(c.pick(['{"x": 1}\n', "{\n", ""]))
    return _check(c, path)


def _words(c: Context, text: str) -> list[Any]:
    build = ["attr-build", *_cpu(c), "--attribute", "x", "--output-dir", "out"]
    if c.rng.random() < 0.5:
        return [*build, "--words", f"good,{text}"]
    path = c.folder / "words.txt"
    path.write_text(f"good\n{text}\n", newline="")
    return [*build, "--words-file", path]


def _name(text: str) -> str:
    """The text as the name of a file."""
    name = text.replace("/", "_")[:80]
    return name if name not in (".", "..") else "x"


_Make = Callable[[Context, str], list[Any]]
# Where the text stands, and the codes that are right there.
_PLACES: dict[str, tuple[_Make, tuple[int, ...]]] = {
    "prompt": (lambda c, text: [*_steer(c), "--prompt", text], (0, 2, 3)),
    "raw prompt": (lambda c, text: [*_steer(c), "--prompt", text, "--format", "text"], (0, 2, 3)),
    "attribute": (lambda c, text: [*_steer(c), "--prompt", "the", "--attribute", text], (0, 2)),
    "option": (lambda c, text: [*_steer(c), "--prompt", "the film", c.pick(_FLAGS), text], (0, 2, 4)),
    "row key": (lambda c, text: _rows(c, {text: "x", "other": text}), (3,)),
    "row text": (lambda c, text: _rows(c, {"text": text, "label": text}), (0, 2, 3)),
    "label": (_labelled, (0, 2, 3)),
    "folder": (_folder, (0,)),
    "output": (_output, (0, 2)),
    "task": (lambda c, text: ["eval", *_cpu(c), "--tasks", text, "--task-data", f"{text}={c.good.rows}"], (0, 2, 3)),
    "recipe": (lambda c, text: ["recipe", "copy", text], (2,)),
    "words": (_words, (0, 3)),
    "argument": (_argument, (0, 2, 3, 4)),
    "stop": (lambda c, text: [*_steer(c), "--prompt", "the", "--stop", text], (0, 2)),
    "command": (_command, (0, 2)),
    "file name": (_file_name, (3,)),
}
# Without an option `--format`, or with one that is given already.
_PLAIN = ("raw prompt", "command")


def hostile(c: Context) -> Case:
    """Text that a terminal, Rich or Markdown would act on, wherever a name or a text can stand."""
    text = c.pick([text for text in HOSTILE if text])
    place = c.pick(sorted(_PLACES))
    make, codes = _PLACES[place]
    fmt = [] if place in _PLAIN else c.pick([[], [], ["--format", "json"]])
    outputs = ("out", _name(text), f"{_name(text)}.settings.json")
    return case(
        [*make(c, text), *fmt], codes, f"{place} {text[:20]!r}", outputs=outputs, raw_text=place == "raw prompt"
    )
