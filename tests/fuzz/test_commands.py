"""Whole commands on malformed input: rows, options, paths, config files, adapters, attributes and stored files.

Invariants of every call: the exit code is documented and belongs to the cause; an error is one `Error:` line, without a
traceback; exit code 0 means a right result; files that existed are unchanged; a failed call leaves no file behind.
`--hypothesis-profile thorough` runs thousands of calls.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from braces_cli.cli.main import build_app, main
from tests.conftest import tiny_model, tiny_tokenizer
from tests.fuzz.budget import fuzz, time_limit
from tests.fuzz.inputs import DEEP, HALF, JSON_TEXT, PLAIN, VALUES, YAML_TEXT, as_bytes, broken_tensors, changed
from tests.fuzz.test_rows import FILES, LINES

# Control characters that a terminal would interpret, and characters that change the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ROWS = [
    {"text": f"the {noun} is {word}", "label": label, "attribute": label}
    for noun in ("film", "town", "end")
    for word, label in (("good", "positive"), ("sad", "negative"), ("old", "neutral"))
]


@dataclass
class Ended:
    code: int
    out: str
    err: str


def run(args: list[Any], folder: Path) -> Ended:
    """Call the command line in `folder`."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit():
            main([str(arg) for arg in args])
        raise AssertionError("main() returned without an exit code")
    except SystemExit as ended:
        return Ended(int(ended.code or 0), out.getvalue(), err.getvalue())
    finally:
        os.chdir(before)


def check(args: list[Any], folder: Path, codes: set[int], outputs: tuple[str, ...] = ()) -> Ended:
    """Call the command line and check the invariants.

    Args:
        codes: right exit codes.
        outputs: paths relative to `folder` that a successful call may write.
    """
    before = snapshot(folder)
    ended = run(args, folder)
    words = " ".join(map(str, args))[:300]
    said = f"braces {words}\nexit code {ended.code}\n{ended.err[-1500:]}"
    assert ended.code in codes, f"expected {sorted(codes)}: {said}"
    assert "Traceback" not in ended.err, said
    assert "fault of braces" not in ended.err + ended.out, said
    assert not _CONTROL.search(ended.err), said
    if "json" in args:
        document = json.loads(ended.out)
        assert ended.code == 0 or document["error"]["code"] == ended.code, said
    else:
        assert sum(line.startswith("Error:") for line in ended.err.splitlines()) == (ended.code != 0), said
    after = snapshot(folder)
    for name in before.keys() | after.keys():
        allowed = any(name == place or name.startswith(f"{place}/") for place in outputs)
        if before.get(name) != after.get(name):
            assert allowed, f"{name} changed or is new: {said}"
            assert ended.code == 0 or name in before, f"{name} is left behind: {said}"
            assert not Path(name).name.startswith("."), f"hidden file {name}: {said}"
    return ended


def snapshot(folder: Path) -> dict[str, Any]:
    """Return kind and content of every path below `folder`."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        kind = stat.S_IFMT(path.lstat().st_mode)
        readable = stat.S_ISREG(kind) and os.access(path, os.R_OK)
        found[str(path.relative_to(folder))] = (kind, path.read_bytes() if readable else None)
    return found


@cache
def good() -> Path:
    """Write a model, rows and the outputs of commands on them; return the folder."""
    folder = Path(tempfile.mkdtemp(prefix="braces-fuzz-"))
    tiny_model("llama", max_position_embeddings=128, vocab_size=96).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    (folder / "prompts.txt").write_text("the film is\na happy day\n")
    base = ("--model", folder / "model", "--device", "cpu")
    for args in (
        train(folder, "run"),
        ("attr-build", *base, "--attribute", "bright", "--words", "good,happy,day", "--output-dir", "attributes"),
        texts(folder, "texts.jsonl"),
        ("eval", *base, "--tasks", "perplexity", "--task-data", f"perplexity={folder / 'rows.jsonl'}",
         "--output-dir", "scores"),
    ):  # fmt: skip
        ended = run(list(args), folder)
        assert ended.code == 0, ended.err
    return folder


def train(base: Path, out: str) -> tuple[Any, ...]:
    return (
        "train", "--model", base / "model", "--device", "cpu", "--data", base / "rows.jsonl", "--max-steps", "4",
        "--rank", "4", "--lr", "0.05", "--save-steps", "2", "--output-dir", out, "--resume", "--quiet",
    )  # fmt: skip


def texts(base: Path, out: str) -> tuple[Any, ...]:
    return (
        "steer", "--model", base / "model", "--device", "cpu", "--prompts", base / "prompts.txt", "--attribute",
        "positive", "--max-new-tokens", "4", "--num-samples", "2", "--batch-size", "2", "--output", out, "--resume",
        "--quiet",
    )  # fmt: skip


@contextlib.contextmanager
def working_folder(**copies: str) -> Iterator[Path]:
    """A folder with copies of good files, as NAME=SOURCE; deleted at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for target, source in copies.items():
            path = good() / source
            if path.is_dir():
                shutil.copytree(path, folder / target)
            else:
                shutil.copy2(path, folder / source)
        yield folder


def model() -> list[Any]:
    return ["--model", good() / "model", "--device", "cpu"]


def prompt(*more: Any) -> list[Any]:
    return ["steer", *model(), "--prompt", "the film", "--max-new-tokens", "4", "--temperature", "0", *more]


READERS: dict[str, Callable[[Any], list[Any]]] = {
    "check": lambda path: ["train", "--check", *model(), "--data", path, "--format", "json"],
    "train": lambda path: ["train", *model(), "--data", path, "--max-steps", "1", "--output-dir", "out", "--quiet"],
    "examples": lambda path: ["attr-build", *model(), "--attribute", "x", "--examples", path, "--output-dir", "out"],
    "eval": lambda path: ["eval", *model(), "--tasks", "perplexity", "--task-data", f"perplexity={path}"],
    "prompts": lambda path: ["steer", *model(), "--max-new-tokens", "2", "--prompts", path],
    "clamp": lambda path: ["inspect", "clamp", "0:1=p50", *model(), "--prompt", "the film", "--data", path],
}


@fuzz(
    st.sampled_from(sorted(READERS)),
    FILES,
    examples=(
        ("train", (".jsonl", b'{"text": "a"}\n{"text": 5}\n')), ("check", (".json", b"[" * 20_000)),
        ("eval", (".jsonl", b'{"text": "\\ud800"}')), ("clamp", (".csv", b'text\n"a')), ("prompts", (".txt", b"")),
        ("examples", (".parquet", b"PAR1\0PAR1")), ("check", (".jsonl", b'{"text": "a"}\n[1]\n')),
    ),
)  # fmt: skip
def test_rows(reader: str, file: tuple[str, bytes]) -> None:
    suffix, content = file
    with working_folder() as folder:
        path = folder / f"rows{suffix}"
        path.write_bytes(content)
        ended = check(READERS[reader](path), folder, {0, 3}, ("out",))
        if suffix == ".jsonl" and not all(map(_is_row, content.split(b"\n"))):
            assert ended.code == 3, content
        if ended.code == 0 and reader == "train":
            check(["inspect", "--adapter", "out"], folder, {0})


def _is_row(line: bytes) -> bool:
    """Return True for a blank line and for a JSON object in UTF-8."""
    try:
        return not line.strip() or isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


PARTS = (
    "0", "1", "-1", "-", "--", ",", ":", "=", ".", "nan", "inf", "1e9", "9" * 5000, "²", "x", " ", "text", "positive",
    "perplexity", "\x00", "\x1b[31m", "\n", "_", "0x1",
)  # fmt: skip
TRAINING = (
    "--rank", "--lr", "--max-steps", "--epochs", "--batch-size", "--seed", "--layers", "--columns", "--opposites",
    "--eval-steps", "--save-steps", "--packing", "--schedule", "--max-length",
)  # fmt: skip


@cache
def flags() -> list[tuple[str, str]]:
    """Return (command, option) of the options that take a value and need no file of a model for a dry run."""
    import typer

    found = []
    for command in ("attr-build", "eval", "merge", "steer"):
        group: Any = typer.main.get_command(build_app([command]))
        for option in group.commands[command].params:
            takes_value = not getattr(option, "is_flag", False) and option.opts[0].startswith("--")
            if takes_value and option.name not in ("config", "model", "adapter", "data"):
                found.append((command, option.opts[0]))
    return sorted(found) + [("train", option) for option in TRAINING]


@fuzz(
    st.deferred(lambda: st.sampled_from(flags())),
    PLAIN | st.lists(st.sampled_from(PARTS), max_size=5).map("".join),
    examples=(
        (("eval", "--batch-size"), "9" * 5000), (("steer", "--top-p"), "nan"), (("steer", "--s"), "inf"),
        (("merge", "--output-dir"), "a\x00b"), (("steer", "--layers"), "\x1b[31m"), (("eval", "--limit"), ""),
    ),
)  # fmt: skip
def test_options(option: tuple[str, str], value: str) -> None:
    command, flag = option
    data = [*model(), "--data", good() / "rows.jsonl", "--output-dir", "out"] if command == "train" else []
    with working_folder() as folder:
        check([command, "--dry-run", *data, f"{flag}={value}"], folder, {0, 2, 3} if data else {0, 2})


CONFIGS = st.one_of(
    YAML_TEXT,
    st.dictionaries(
        st.sampled_from(["max_steps", "max-steps", "rank", "lr", "epochs", "layers", "seed", "packing", "output_dir",
                         "opposites", "resume", "modle", "config"]),
        VALUES,
        max_size=3,
    ).map(json.dumps),
)  # fmt: skip


@fuzz(
    as_bytes(CONFIGS),
    examples=(
        (b"a: &a [*a]\n",), (b"seed: 1\nseed: 2\n",), (b"model: !!python/object/apply:os.getpid []\n",),
        (b"- model\n",), (b"max_steps: 1\nmax-steps: 2\n",), (b"data: " + b"[" * 3000,), (b"modle: x\n",),
    ),
)  # fmt: skip
def test_config_files(content: bytes) -> None:
    with working_folder() as folder:
        (folder / "config.yaml").write_bytes(content)
        args = ["train", *model(), "--data", good() / "rows.jsonl", "--dry-run", "--config", "config.yaml"]
        ended = check([*args, "--format", "json"], folder, {0, 2})
        if b"modle" in content or content.count(b"seed: ") == 2:
            assert ended.code == 2


INPUTS: dict[str, Callable[[Any], list[Any]]] = {
    **{name: READERS[name] for name in ("check", "eval", "prompts", "clamp")},
    "adapter": lambda path: ["inspect", "--adapter", path],
    "model": lambda path: ["steer", "--model", path, "--prompt", "x"],
    "attributes": lambda path: prompt("--attributes", path, "--attribute", "bright"),
    "config": lambda path: ["train", "--dry-run", "--config", path],
    "words": lambda path: ["attr-build", *model(), "--attribute", "x", "--words-file", path, "--output-dir", "out"],
    "map": lambda path: ["inspect", "find", "film", "--map", path],
    "merge": lambda path: ["merge", "--adapter", path, "--output-dir", "out"],
}
OUTPUTS: dict[str, Callable[[Any], list[Any]]] = {
    "train": lambda path: [*train(good(), "x")[:-4], "--output-dir", path],
    "steer": lambda path: prompt("--output", path),
    "eval": lambda path: [*READERS["eval"](good() / "rows.jsonl"), "--output-dir", path],
    "merge": lambda path: ["merge", "--adapter", good() / "run", "--output-dir", path],
    "report": lambda path: ["inspect", "report", *model(), "--output", path],
    "recipe": lambda path: ["recipe", "copy", "small-sentiment", "--output-dir", path],
}
PLACES = ("missing", "folder", "loop", "dangling", "below a file", "long", "bytes", "empty")


@fuzz(st.sampled_from(sorted(INPUTS)), st.sampled_from(PLACES))
def test_paths_of_inputs(reader: str, kind: str) -> None:
    with working_folder() as folder:
        path = _path(folder, kind)
        ended = check(INPUTS[reader](path), folder, {0, 2, 3, 4}, ("out",))
        # An empty value can mean that the option is not set, and an empty folder has no attributes in it.
        assert ended.code != 0 or kind in ("empty", "folder")


@fuzz(st.sampled_from(sorted(OUTPUTS)), st.sampled_from(["loop", "below a file", "long", "taken"]))
def test_paths_of_outputs(writer: str, kind: str) -> None:
    with working_folder() as folder:
        path = _path(folder, kind)
        check(OUTPUTS[writer](path), folder, {1, 2})


def _path(folder: Path, kind: str) -> Any:
    """Create a path from which a file cannot be read, or to which a result must not be written."""
    path = folder / "given"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("given")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "below a file":
        path.write_text("x")
        path = path / "x"
    elif kind == "taken":
        path.mkdir()
        for name in ("theirs", "small-sentiment.yaml"):
            (path / name).write_text("x")
    return {"long": "a" * 5000, "bytes": os.fsdecode(b"\xff\xfename"), "empty": ""}.get(kind, path)


def _read(name: str) -> bytes:
    return (good() / name).read_bytes()


@cache
def steered_text() -> str:
    return run(prompt("--adapter", good() / "run"), good()).out


def _config_changes() -> st.SearchStrategy[Any]:
    """Adapter configs with up to two wrong places, except in factors that legitimately change the output."""
    config = json.loads(_read("run/adapter_config.json"))
    fixed = {key: value for key, value in config.items() if isinstance(value, list) and key != "layers"}
    return changed({key: value for key, value in config.items() if key not in fixed}).map(
        lambda value: {**fixed, **value} if isinstance(value, dict) else value
    )


@fuzz(st.deferred(_config_changes))
def test_adapter_configs(config: Any) -> None:
    with working_folder(adapter="run") as folder:
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        ended = check(prompt("--adapter", "adapter"), folder, {0, 4})
        assert ended.code == 4 or ended.out == steered_text()


@fuzz(st.deferred(lambda: broken_tensors(_read("run/adapter_model.safetensors"))), examples=((b"",), (b"\x80\x04.",)))
def test_adapter_tensors(content: bytes) -> None:
    with working_folder(adapter="run") as folder:
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(content)
        check(prompt("--adapter", "adapter"), folder, {0, 4})


@fuzz(st.deferred(lambda: broken_tensors(_read("attributes/bright.safetensors"))), examples=((b"",),))
def test_attribute_files(content: bytes) -> None:
    with working_folder(attributes="attributes") as folder:
        (folder / "attributes" / "bright.safetensors").write_bytes(content)
        check(prompt("--attributes", "attributes", "--attribute", "bright"), folder, {0, 2, 4})
        check(["attr-build", "--list", "--output-dir", "attributes"], folder, {0, 2, 4})


def _broken(content: bytes, name: str) -> st.SearchStrategy[bytes]:
    if name.endswith(".safetensors"):
        return broken_tensors(content)
    if name.endswith(".json"):
        return as_bytes(st.one_of(changed(json.loads(content)).map(json.dumps), JSON_TEXT, DEEP))
    return as_bytes(st.one_of(LINES.map("\n".join), st.just(content.decode())))


def _stored(place: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """(name, broken content) of one of the files of a folder that `good` holds."""
    paths = [path for path in sorted((good() / place).rglob("*")) if path.suffix in (".json", ".jsonl", ".safetensors")]
    names = [str(path.relative_to(good() / place)) for path in paths if path.is_file()]
    return st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), _broken((good() / place / name).read_bytes(), name))
    )


@fuzz(st.deferred(lambda: _stored("run/checkpoint-2")))
def test_checkpoints(file: tuple[str, bytes]) -> None:
    """A resumed run gives the adapter of the uninterrupted run, or is refused."""
    name, content = file
    with working_folder(run="run") as folder:
        for path in ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "run.json"):
            (folder / "run" / path).unlink(missing_ok=True)
        shutil.rmtree(folder / "run" / "checkpoint-4")
        (folder / "run" / "checkpoint-2" / name).write_bytes(content)
        ended = check(list(train(good(), "run")), folder, {0, 2, 4}, ("run",))
        if ended.code == 0:
            assert (folder / "run" / "adapter_model.safetensors").read_bytes() == _read("run/adapter_model.safetensors")


@fuzz(st.sampled_from(["texts.jsonl", "texts.jsonl.settings.json"]), st.data())
def test_files_of_texts(name: str, data: Any) -> None:
    """A resumed file of texts has the rows of an uninterrupted one, or is refused and unchanged."""
    content = data.draw(_broken(_read(name), name) | st.integers(0, len(_read(name))).map(lambda n: _read(name)[:n]))
    with working_folder(a="texts.jsonl", b="texts.jsonl.settings.json") as folder:
        (folder / name).write_bytes(content)
        before = snapshot(folder)
        ended = check(list(texts(good(), "texts.jsonl")), folder, {0, 2, 3, 4}, ("texts.jsonl",))
        if ended.code == 0:
            assert (folder / "texts.jsonl").read_bytes() == _read("texts.jsonl")
        else:
            assert snapshot(folder) == before


@fuzz(st.deferred(lambda: _stored("scores")))
def test_stored_scores(file: tuple[str, bytes]) -> None:
    with working_folder(scores="scores") as folder:
        (folder / "scores" / file[0]).write_bytes(file[1])
        args = [*READERS["eval"](good() / "rows.jsonl"), "--output-dir", "scores", "--resume"]
        check(args, folder, {0, 2, 3, 4}, ("scores",))


@fuzz(
    st.sampled_from(["prompt", "attribute", "find", "label"]),
    PLAIN.filter(lambda text: HALF not in text),
    examples=(("attribute", "\x1b[31mred"), ("find", "a\rError: x"), ("label", "\u202e"), ("prompt", "[bold]x[/]")),
)
def test_text_for_a_terminal(where: str, text: str) -> None:
    with working_folder() as folder:
        (folder / "rows.jsonl").write_text(json.dumps({"text": "a day", "attribute": text}) + "\n")
        check(
            {
                "prompt": ["steer", *model(), "--max-new-tokens", "2", f"--prompt={text}"],
                "attribute": prompt(f"--attribute={text}"),
                "find": ["inspect", "find", *model(), "--", text],
                "label": ["train", "--check", *model(), "--data", "rows.jsonl", "--attribute-field", "attribute"],
            }[where],
            folder,
            {0, 2, 3},
        )


def test_options_are_found() -> None:
    assert len(flags()) > 50
    with pytest.raises(AssertionError):
        check(["train"], good(), {0})
