"""Ways to break a value, a JSON document, a safetensors file or any file, chosen by the case's generator."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sandbox import CANARY, Case

DEEP = 20_000
# What a terminal would act on, and what Rich or Markdown would.
HOSTILE = (
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b[2J", "a\rError: forged", "two\nError: forged", "\x9b31m",
    "\x07bell", "[bold]x[/bold]", "[/]", "[/red]", "[link=file:///etc]x[/link]", "[", "\\[", "\u202egnp.exe",
    "\u2066x\u2069", "\u2028line", "\u200fx", "a\tb", "\x7f", "\x85", "\x08\x08\x08", "%s%n{0}{x}", "{{ 7 * 7 }}",
    "<script>x</script>", "|a|b|", "# head", "![x](http://x)", "`x`", "x" * 3000, "é\u0301" * 50, "🐍" * 40, "", " ",
)  # fmt: skip


@dataclass
class Context:
    """What a case is made from.

    Attributes:
        rng: of the case; the only source of chance.
        folder: of the case, in which the call runs.
        good: the good files (`good.Good`).
    """

    rng: Random
    folder: Path
    good: Any

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.rng.randrange(len(items))]

    def copy(self, source: Path, name: str | None = None) -> Path:
        """A copy of a good file or folder in the case's folder."""
        goal = self.folder / (name or source.name)
        if source.is_dir():
            shutil.copytree(source, goal)
        else:
            shutil.copy2(source, goal)
        return goal


def case(args: Sequence[Any], codes: Any, what: str, **more: Any) -> Case:
    """A case; `codes` is one exit code or several."""
    right = frozenset({codes}) if isinstance(codes, int) else frozenset(codes)
    return Case(tuple(map(str, args)), right, what, **more)


def wrong_values(good: Any) -> list[Any]:
    """Values of other types than `good`, or beyond any sensible range of it."""
    values: list[Any] = [None, "text", -1, 1.5, [], {}, [[]], {"a": 1}, [None], float("nan"), 10**30, True, ""]
    if isinstance(good, bool):
        return [v for v in values if not isinstance(v, bool)]
    if isinstance(good, str):
        return [v for v in values if not isinstance(v, str)]
    if isinstance(good, int):
        return [v for v in values if v is not True]
    if isinstance(good, float):
        return [None, "text", [], {}, [[]], float("nan"), float("inf"), "1.0"]
    if isinstance(good, list):
        return [v for v in values if not isinstance(v, list)] + [[*good, None], [*good, {}], [[good]]]
    if isinstance(good, dict):
        return [v for v in values if not isinstance(v, dict)]
    return values[1:]


def paths_of(value: Any, at: tuple[Any, ...] = (), depth: int = 6) -> list[tuple[Any, ...]]:
    """The places in a JSON document."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, item in items if depth else ():
        found += paths_of(item, (*at, key), depth - 1)
    return found


def get(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy of the document with another value at a place."""
    value = copy.deepcopy(value)
    get(value, at[:-1])[at[-1]] = new
    return value


def change_json(c: Context, value: Any, depth: int = 3) -> tuple[Any, str]:
    """A document with one thing changed at random, and what that was; it may still be good."""
    places = paths_of(value, depth=depth)
    at = c.pick(places) if places else ()
    if not at:
        return c.pick(wrong_values(value)), "another document"
    name = ".".join("N" if isinstance(key, int) else str(key) for key in at)[:60]
    way = c.rng.randrange(4)
    if way == 0:
        value = copy.deepcopy(value)
        del get(value, at[:-1])[at[-1]]
        return value, f"{name} removed"
    if way == 1:
        return put(value, at, c.pick(HOSTILE)), f"{name} hostile text"
    new = c.pick(wrong_values(get(value, at)))
    return put(value, at, new), f"{name} = {json.dumps(new)[:30]}"


# Ways to break a whole file of text or JSON, none of which leaves it readable.
_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "only white space": b" \n\t ",
    "not UTF-8": b'{"text": "\xff\xfe\x80"}\n',
    "zero bytes": b"\0" * 64,
    "not JSON": b"{'text': 1,}\n",
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number of many digits": b'{"method": ' + b"9" * 5000 + b"}",
    "a pickle": b"",
    "an HTML page": b"<!doctype html><html><body>404</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
}
_PLACES = ("a folder", "a symlink loop", "a dangling link", "no permission", "a truncated file", "a FIFO")


def break_file(c: Context, path: Path, kinds: Sequence[str] = (*_TEXTS, *_PLACES)) -> tuple[str, dict[str, Any]]:
    """Break a file; returns in which way, and what the case needs for it."""
    kind = c.pick(kinds)
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    more: dict[str, Any] = {}
    if kind == "a folder":
        path.mkdir()
    elif kind == "a symlink loop":
        path.symlink_to(path.name)
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "no permission":
        path.write_bytes(content)
        path.chmod(0)
        more["unprivileged"] = True
    elif kind == "a truncated file":
        path.write_bytes(content[: c.rng.randrange(1, max(2, len(content) - 2))])
    elif kind == "a pickle":
        path.write_bytes(pickled())
    else:
        path.write_bytes(_TEXTS[kind])
    return kind, more


class _Executed:
    """Unpickled, it writes the canary into the working folder."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (CANARY,))


def pickled() -> bytes:
    """A pickle that runs code when it is loaded."""
    return pickle.dumps(_Executed())


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_safetensors(path: Path, header: Any, data: bytes) -> None:
    """Write header and data as they are, right or wrong."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# Ways to break a safetensors file that every reader must notice.
TENSOR_WAYS = (
    "truncated", "header length", "header text", "offsets", "dtype unknown", "shape", "tensor missing", "cut to half",
    "empty", "a pickle", "a folder", "a symlink loop", "a dangling link", "no permission", "header deep", "more data",
)  # fmt: skip


def break_tensors(c: Context, path: Path, ways: Sequence[str] = TENSOR_WAYS) -> tuple[str, dict[str, Any]]:
    """Break a safetensors file; returns in which way, and what the case needs for it."""
    way = c.pick(ways)
    if way in (*_PLACES, "empty", "a pickle"):
        return break_file(c, path, [way])
    header, data = read_safetensors(path)
    names = sorted(name for name in header if name != "__metadata__")
    name = c.pick(names)
    content = path.read_bytes()
    if way == "truncated":
        path.write_bytes(content[: -c.rng.randrange(1, max(2, len(data)))])
    elif way == "cut to half":
        path.write_bytes(content[: c.rng.randrange(1, 60)])
    elif way == "header length":
        path.write_bytes(struct.pack("<Q", c.pick([0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])) + content[8:])
    elif way == "header text":
        text = c.pick([b"{}", b"[]", b"null", b"{", b'{"a": 1}', b"\xff\xff", b'"x"', b"7"])
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    elif way == "header deep":
        text = b'{"a":' * DEEP + b"1" + b"}" * DEEP
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    elif way == "more data":
        path.write_bytes(content + b"\0" * 64)
    else:
        if way == "offsets":
            header[name]["data_offsets"] = c.pick([[0, 10**12], [5, 1], [0, 1], [0], "x", [0.5, 1], [-4, 4], None])
        elif way == "dtype unknown":
            header[name]["dtype"] = c.pick(["F7", 5, None, "f32", ["F32"]])
        elif way == "shape":
            header[name]["shape"] = c.pick([[10**9, 10**9], [-1], "x", [0], [[1]], None, [7], [1.5]])
        else:
            del header[name]
        write_safetensors(path, header, data)
    return way, {}


def edit_tensors(c: Context, path: Path, way: str, names: Sequence[str] = ()) -> str:
    """Write a well-formed safetensors file whose tensors are wrong in one way; returns which tensor it was.

    Args:
        way: `nan`, `inf`, `-inf`, `zeros`, `huge`, `shape`, `dtype`, `missing`, `extra` or `transposed`.
        names: tensors to choose from; none: all.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    name = c.pick(sorted(names or tensors))
    tensor = tensors[name]
    if way in ("nan", "inf", "-inf", "huge"):
        flat = tensor.clone().float().flatten()
        flat[c.rng.randrange(len(flat))] = {"huge": 3e38}.get(way) or float(way)
        tensors[name] = flat.reshape(tensor.shape)
    elif way == "zeros":
        tensors[name] = torch.zeros_like(tensor)
    elif way == "shape":
        shapes = [(*tensor.shape, 1), (tensor.numel() + 1,), (), (0,), tuple(size + 1 for size in tensor.shape)]
        tensors[name] = torch.ones(c.pick(shapes))
    elif way == "dtype":
        tensors[name] = tensor.to(c.pick([torch.int32, torch.int64, torch.bool, torch.float64, torch.uint8]))
    elif way == "missing":
        del tensors[name]
    elif way == "extra":
        tensors[c.pick(["extra", "layers.9.gate", "condition.x"])] = torch.ones(2)
    elif way == "transposed":
        tensors[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[None]
    path.unlink()
    save_file(tensors, path, metadata)
    return name
