"""Bad inputs: paths from which nothing can be read, and to which nothing can be written."""

from __future__ import annotations

import os
from typing import Any

from mutate import HOSTILE, Context, case
from sandbox import Case

_LONG = ("a" * 300, "a/" * 2500 + "a", "a" * 5000, "é" * 200)
_BYTES = os.fsdecode(b"\xff\xfe\x80name")


def _inputs(c: Context, path: Any) -> tuple[list[Any], Any]:
    """A call that reads `path`, and the codes where nothing can be read there."""
    model = ["--model", c.good.model, "--device", "cpu"]
    steer = ["steer", *model, "--max-new-tokens", "2"]
    prompt = [*steer, "--prompt", "the film"]
    rows = ["train", *model, "--output-dir", "out", "--max-steps", "1"]
    return c.pick([
        ([*rows, "--data", path], 3),
        ([*rows, "--data", c.good.rows, "--eval-data", path], 3),
        (["train", "--check", "--model", c.good.model, "--data", path], 3),
        ([*steer, "--prompts", path], 3),
        ([*prompt, "--adapter", path], 4),
        (["steer", "--model", path, "--prompt", "x", "--max-new-tokens", "2"], 4),
        ([*prompt, "--attributes", path, "--attribute", "positive"], (2, 4)),
        ([*prompt, "--attribute", "positive", "--sweep", "0:1:1", "--scorer", path], (2, 4)),
        ([*prompt, "--attribute", "positive", "--sweep", "0:1:1", "--scorer", f"fit:{path}"], 3),
        ([*prompt, "--attribute", "positive", "--sweep", "0:1:1", "--judge-model", path], 4),
        ([*prompt, "--config", path], 2),
        (["train", "--dry-run", "--config", path], 2),
        (["eval", *model, "--tasks", "perplexity", "--task-data", f"perplexity={path}"], (2, 3)),
        (["eval", *model, "--tasks", "perplexity", "--task-data-dir", path], (2, 3)),
        (["eval", *model, "--tasks", "perplexity", "--task-data", f"perplexity={c.good.rows}", "--adapter", path], 4),
        (["attr-build", *model, "--attribute", "x", "--words-file", path, "--output-dir", "out"], 3),
        (["attr-build", *model, "--attribute", "x", "--examples", path, "--output-dir", "out"], 3),
        (["attr-build", "--list", "--adapter", path], 4),
        (["inspect", "--adapter", path], 4),
        (["inspect", "find", "film", "--map", path], (2, 3, 4)),
        (["inspect", "diff", c.good.adapter, path, "--adapters"], 4),
        (["inspect", "diff", c.good.model, path], 4),
        (["inspect", "clamp", "0:1=p50", *model, "--prompt", "x", "--data", path], 3),
        (["inspect", "clamp", "0:1=1", *model, "--prompts", path], 3),
        (["merge", "--check", path], 4),
        (["merge", "--adapter", path, "--output-dir", "out"], 4),
        (["export", "lora", "--base", path, "--adapter", c.good.adapter, "--output-dir", "out"], (2, 4)),
        (["export", "code", "--adapter", path, "--output-dir", "out"], 4),
    ])  # fmt: skip


def _outputs(c: Context, path: Any) -> list[Any]:
    """A call that writes to `path`."""
    model = ["--model", c.good.model, "--device", "cpu"]
    prompt = ["steer", *model, "--max-new-tokens", "2", "--prompt", "the film"]
    sweep = [*prompt, "--attribute", "positive", "--sweep", "0:1:1"]
    return list(c.pick([
        ["train", *model, "--data", c.good.rows, "--max-steps", "1", "--output-dir", path],
        [*prompt, "--output", path],
        [*sweep, "--plot", path],
        [*sweep, "--scorer", f"fit:{c.good.rows}", "--save-scorer", path],
        ["eval", *model, "--tasks", "perplexity", "--task-data", f"perplexity={c.good.rows}", "--output-dir", path],
        ["eval", *model, "--tasks", "perplexity", "--task-data", f"perplexity={c.good.rows}", "--plot", path],
        ["attr-build", *model, "--attribute", "positive", "--output-dir", path],
        ["merge", "--adapter", c.good.adapter, "--output-dir", path],
        ["inspect", "report", *model, "--output", path],
        ["inspect", "values", *model, "--output", path],
        ["recipe", "copy", "small-sentiment", "--output-dir", path],
        ["export", "code", "--adapter", c.good.adapter, "--output-dir", path],
        ["demo", "--output-dir", path],
    ]))  # fmt: skip


def _bad_input(c: Context) -> tuple[Any, str, dict[str, Any]]:
    """A path from which nothing can be read."""
    way = c.pick(["missing", "long", "bytes", "empty", "loop", "dangling", "no permission", "parent without permission",
                  "below a file", "FIFO", "device", "odd", "user", "empty folder", "newline"])  # fmt: skip
    path = c.folder / "given"
    more: dict[str, Any] = {}
    name: Any = path
    if way == "missing":
        name = c.pick([path, "nothing.jsonl", "no/such/thing.jsonl", "./x", "../x.jsonl", "/no/such.txt"])
    elif way == "long":
        name = c.pick(_LONG)
    elif way == "bytes":
        name = c.pick([_BYTES, f"{_BYTES}.jsonl", f"{_BYTES}/x/y"])
    elif way == "empty":
        name = ""
    elif way == "loop":
        path.symlink_to("given")
    elif way == "dangling":
        path.symlink_to("nowhere")
    elif way.endswith("permission"):
        (path / "inner").mkdir(parents=True)
        path.chmod(0)
        name = path / "inner" / "x.jsonl" if way.startswith("parent") else path
        more["unprivileged"] = True
    elif way == "below a file":
        path.write_text("x")
        name = path / "x.jsonl"
    elif way == "FIFO":
        os.mkfifo(path)
    elif way == "device":
        name = c.pick(["/dev/null", "/proc/self/mem", "/dev/full"])
    elif way == "odd":
        name = c.pick([text for text in HOSTILE if text.strip() and len(text) < 200])
    elif way == "user":
        name = c.pick(["~nobody-here/x.jsonl", "~/x.jsonl", "$HOME/x", "file:///etc/passwd", "http://x/y.jsonl"])
    elif way == "empty folder":
        path.mkdir()
    else:
        name = c.folder / "two\nError: lines"
        name.write_text("")
    return name, way, more


def _bad_output(c: Context) -> tuple[Any, str, dict[str, Any]]:
    """A path to which nothing can be written."""
    way = c.pick(["long", "below a file", "loop", "no permission", "system", "taken", "device", "parent loop"])
    path = c.folder / "given"
    more: dict[str, Any] = {}
    name: Any = path
    if way == "long":
        name = c.pick(_LONG[:3])
    elif way == "below a file":
        path.write_text("x")
        name = path / "x"
    elif way == "loop":
        path.symlink_to("given")
    elif way == "no permission":
        path.mkdir(mode=0)
        path.chmod(0)
        name = path / "x"
        more["unprivileged"] = True
    elif way == "system":
        name = c.pick(["/proc/x", "/sys/x", "/proc/self/x/y", "/dev/null/x"])
    elif way == "taken":
        path.mkdir()
        (path / "theirs").write_text("x")
        for name in ("positive.safetensors", "small-sentiment.yaml"):
            (path / name).write_text("x")
        name = path
    elif way == "parent loop":
        path.symlink_to("given")
        name = path / "x"
    else:
        name = "/dev/full"
    return name, way, more


def files(c: Context) -> Case:
    """A path that cannot be read or written."""
    if c.rng.random() < 0.65:
        name, way, more = _bad_input(c)
        args, codes = _inputs(c, name)
        codes = (codes,) if isinstance(codes, int) else codes
        if way == "empty":
            codes = {0, 2, *codes} if "--adapter" in args or "--scorer" in args else {2, *codes}
        # Bytes that are no text, and some files without permission, are refused with the call's other words.
        if way in ("odd", "user", "missing", "bytes", "no permission"):
            codes = {2, *codes}
        if name == "/dev/null" or way in ("empty folder", "newline"):
            codes = {0, 2, *codes}
        return case(args, codes, f"input {way}", outputs=("out",), **more)
    name, way, more = _bad_output(c)
    args = _outputs(c, name)
    # What the system refuses is found before the work, or while running.
    codes = {2} if way in ("taken", "below a file") else {1, 2}
    return case(args, codes, f"output {way}", **more)
