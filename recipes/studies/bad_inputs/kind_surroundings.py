"""Bad inputs: the streams, encoding, disk and variables of the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mutate import Context, case
from sandbox import Case


def surroundings(c: Context) -> Case:
    """Closed streams, narrow encodings, full disks and variables of launchers that are no numbers."""
    model = ["--model", c.good.model, "--device", "cpu"]
    steer = ["steer", *model, "--max-new-tokens", "4", "--prompts", c.good.prompts]
    train = ["train", *model, "--data", c.good.rows, "--max-steps", "2", "--output-dir", "out"]
    calls = [
        [*steer], [*steer, "--format", "json"], ["inspect", "--adapter", c.good.adapter], ["recipe", "list"],
        ["inspect", "values", *model, "--layers", "0", "--index", "0-3"], ["inspect", "trace", "the film", *model],
        ["train", "--check", "--model", c.good.model, "--data", c.good.rows], ["--help"], ["steer", "--no-such"],
        ["inspect", "--adapter", "nothing"], ["env"], ["attr-build", "--list"],
    ]  # fmt: skip
    way = c.pick(["closed", "closed", "encoding", "encoding", "variables", "variables", "full disk", "full disk",
                  "stdin"])  # fmt: skip
    args = c.pick(calls)
    fails = args[-1] in ("--no-such", "nothing")
    right: Any = {2, 4} if fails else 0
    if way == "closed":
        closed = c.pick([(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
        # Without a stream for results, a call may say that it failed.
        right = {*(right if fails else {0}), *({0, 1} if 1 in closed and not fails else ())}
        return case(args, right, f"closed {closed}", closed=closed)
    if way == "encoding":
        encoding = c.pick(["ascii", "latin-1", "cp1252"])
        folder = c.copy(c.good.model, "own")
        _foreign(folder)
        args = ["steer", "--model", folder, "--device", "cpu", "--prompt", "the é 🐍 film", "--max-new-tokens", "8"]
        args = c.pick([args, [*args, "--format", "text"], [*args, "--attribute", "ü"],
                       ["inspect", "values", "--model", folder], ["inspect", "trace", "the é film", "--model", folder],
                       ["inspect", "find", "ü", "--model", folder]])  # fmt: skip
        right = 2 if "ü" in args else 0
        return case(args, (0, 2) if args[1] == "find" else right, f"{encoding}", encoding=encoding)
    if way == "variables":
        name = c.pick(["RANK", "WORLD_SIZE", "LOCAL_RANK"])
        value = c.pick(["x", "", "-1", "1.5", "²", "9" * 30])
        args = c.pick([train, steer, ["inspect", "--adapter", "nothing"], [*train, "--check"]])
        env = {"WORLD_SIZE": "2", name: value} if name == "LOCAL_RANK" else {name: value}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        return case(args, (0, 1, 2, 4), f"{name}={value[:8]}", env=env, outputs=("out",))
    if way == "full disk":
        return _full_disk(c)
    content = c.pick([b"", b"\xff\xfe\n", b"the film\n\x00\n", b"{\n", b"\xed\xa0\x80\n", b"\r\r\n"])
    args = ["steer", *model, "--max-new-tokens", "2", *c.pick([[], ["--interactive"], ["--prompts", "-"]])]
    return case(args, (0, 2, 3), f"stdin {content!r}", stdin=content)


def _full_disk(c: Context) -> Case:
    """No file may grow beyond a few bytes; what was written before may stay, and a rerun goes on from there."""
    model = ["--model", c.good.model, "--device", "cpu"]
    steer = ["steer", *model, "--max-new-tokens", "4", "--prompts", c.good.prompts]
    limit = c.pick([0, 1, 100, 2000, 20_000])
    args = c.pick([
        ["train", *model, "--data", c.good.rows, "--max-steps", "2", "--output-dir", "out"],
        [*steer, "--output", "texts.jsonl"],
        ["attr-build", *model, "--attribute", "sad", "--output-dir", "out"],
        ["eval", *model, "--tasks", "perplexity", "--task-data", f"perplexity={c.good.rows}", "--output-dir", "out"],
        ["inspect", "report", *model, "--output", "out.html"],
        ["inspect", "values", *model, "--output", "out.parquet"],
        [*steer, "--attribute", "positive", "--sweep", "0:1:1", "--plot", "out.png"],
        ["recipe", "copy", "small-sentiment", "--output-dir", "out"],
    ])  # fmt: skip
    outputs = ("out", "texts.jsonl", "texts.jsonl.settings.json", "out.html", "out.parquet", "out.png")
    return case([*args, "--quiet"], (0, 1), f"files of {limit} bytes", file_limit=limit, outputs=outputs, keeps=True)


def _foreign(folder: Path) -> None:
    """Give a model tokens that no narrow encoding has."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    kept = {word for pair in value["model"]["merges"] for word in (*pair, "".join(pair))}
    free = [word for word in value["model"]["vocab"] if word not in kept and not word.startswith("<")]
    for number, word in enumerate(free):
        value["model"]["vocab"][chr(0x4E00 + number)] = value["model"]["vocab"].pop(word)
    path.write_text(json.dumps(value))
