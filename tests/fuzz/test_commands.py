"""Whole commands on malformed input: rows, options, paths, config files, adapters, attributes and stored files.

Invariants of every call: the exit code is documented and belongs to the cause; an error is one `Error:` line, without a
traceback; exit code 0 means a right result; files that existed are unchanged; a failed call leaves no file behind.
`--hypothesis-profile thorough` runs thousands of calls.
"""

import contextlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import strategies as st

from braces_cli.cli.main import build_app, main
from tests.conftest import Outcome, tiny_model, tiny_tokenizer
from tests.fuzz import inputs
from tests.fuzz.inputs import as_bytes, fuzz

# Control characters that a terminal would interpret, and characters that change the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# A model, rows and the outputs of commands on them (`good`); deleted with the cache of the tests.
GOOD = Path(tempfile.mkdtemp(prefix="fuzz-", dir=os.environ["BRACES_CACHE"]))
MODEL = ("--model", GOOD / "model", "--device", "cpu")
TRAIN = (
    "train", *MODEL, "--data", GOOD / "rows.jsonl", "--max-steps", "4", "--rank", "4", "--lr", "0.05", "--save-steps",
    "2", "--quiet", "--output-dir",
)  # fmt: skip
TEXTS = (
    "steer", *MODEL, "--prompts", GOOD / "prompts.txt", "--attribute", "positive", "--max-new-tokens", "4",
    "--num-samples", "2", "--batch-size", "2", "--resume", "--quiet", "--output", "texts.jsonl",
)  # fmt: skip
PROMPT = ("steer", *MODEL, "--prompt", "the film", "--max-new-tokens", "4", "--temperature", "0")
BUILD = ("attr-build", *MODEL, "--attribute", "bright", "--output-dir")
READERS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "check": lambda path: ("train", "--check", *MODEL, "--data", path, "--format", "json"),
    "train": lambda path: ("train", *MODEL, "--data", path, "--max-steps", "1", "--output-dir", "out", "--quiet"),
    "examples": lambda path: (*BUILD, "out", "--examples", path),
    "eval": lambda path: ("eval", *MODEL, "--tasks", "perplexity", "--task-data", f"perplexity={path}"),
    "prompts": lambda path: ("steer", *MODEL, "--max-new-tokens", "2", "--prompts", path),
    "clamp": lambda path: ("inspect", "clamp", "0:1=p50", *MODEL, "--prompt", "the film", "--data", path),
}
SCORES = (*READERS["eval"](GOOD / "rows.jsonl"), "--output-dir")


@pytest.fixture(scope="module", autouse=True)
def good() -> None:
    """Write the files of GOOD."""
    tiny_model("llama", max_position_embeddings=128, vocab_size=96).save_pretrained(GOOD / "model")
    tiny_tokenizer().save_pretrained(GOOD / "model")
    labels = {"good": "positive", "sad": "negative", "old": "neutral"}
    rows = [{"text": f"the {n} is {w}", "label": labels[w]} for n in ("film", "town", "end") for w in labels]
    (GOOD / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (GOOD / "prompts.txt").write_text("the film is\na happy day\n")
    build = (*BUILD, "attributes", "--words", "good,happy,day")
    for args in ((*TRAIN, "run"), build, TEXTS, (*SCORES, "scores")):
        ended = run(args, GOOD)
        assert ended.code == 0, ended.err


def run(args: tuple[Any, ...], folder: Path) -> Outcome:
    """Call the command line in `folder`."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(folder), streams[0], streams[1], pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def check(args: tuple[Any, ...], folder: Path, codes: set[int], output: str = "nothing") -> Outcome:
    """Call the command line and check the invariants; `output` is what a successful call may write."""
    before = snapshot(folder)
    ended = run(args, folder)
    said = f"braces {' '.join(map(str, args))[:300]}\nexit code {ended.code}\n{ended.err[-1500:]}"
    assert ended.code in codes, f"expected {sorted(codes)}: {said}"
    assert "Traceback" not in ended.err, said
    assert "fault of braces" not in ended.err + ended.out, said
    assert not _CONTROL.search(ended.err), said
    if "json" in args:
        assert ended.code == 0 or ended.json["error"]["code"] == ended.code, said
    else:
        assert sum(line.startswith("Error:") for line in ended.err.splitlines()) == (ended.code != 0), said
    after = snapshot(folder)
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            assert name == output or name.startswith((f"{output}/", f"{output}.settings.")), (
                f"{name} changed or is new: {said}"
            )
            assert ended.code == 0 or name in before, f"{name} is left behind: {said}"
            assert not Path(name).name.startswith("."), f"hidden file {name}: {said}"
    return ended


def snapshot(folder: Path) -> dict[str, Any]:
    """Return kind and content of every path below `folder`."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        kind = stat.S_IFMT(path.lstat().st_mode)
        found[str(path.relative_to(folder))] = (kind, path.read_bytes() if stat.S_ISREG(kind) else None)
    return found


@contextlib.contextmanager
def working_folder(*names: str) -> Iterator[Path]:
    """A folder with copies of good files; deleted at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for each in names:
            copy = shutil.copytree if (GOOD / each).is_dir() else shutil.copy2
            copy(GOOD / each, folder / each)
        yield folder


@fuzz(
    st.sampled_from(sorted(READERS)),
    inputs.FILES,
    examples=(
        ("train", (".jsonl", b'{"text": "a"}\n{"text": 5}\n')), ("check", (".json", b"[" * 20_000)),
        ("eval", (".jsonl", b'{"text": "\\ud800"}')), ("clamp", (".csv", b'text\n"a')), ("prompts", (".txt", b"")),
        ("examples", (".parquet", b"PAR1\0PAR1")), ("check", (".jsonl", b'{"text": "a"}\n[1]\n')),
        ("check", (".jsonl", b'{"text": ' + b"[" * 100_000 + b"}")), ("check", (".csv", b"text\na\x00b\n")),
        ("check", (".json", b'[{"text": ' + b"9" * 5000 + b"}]")), ("check", (".csv", b"text\n" + b"x" * 200_000)),
        ("check", (".jsonl", b"\xef\xbb\xbf{}")), ("prompts", (".jsonl", b'{"prompt": {"text": 5}}')),
    ),
)  # fmt: skip
def test_rows(reader: str, file: tuple[str, bytes]) -> None:
    suffix, content = file
    with working_folder() as folder:
        path = folder / f"rows{suffix}"
        path.write_bytes(content)
        ended = check(READERS[reader](path), folder, {0, 3}, "out")
        if suffix == ".jsonl" and not all(map(_is_row, content.split(b"\n"))):
            assert ended.code == 3, content
        if ended.code == 0 and reader == "train":
            check(("inspect", "--adapter", "out"), folder, {0})


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


@cache
def flags() -> list[tuple[str, str]]:
    """Return (command, option) of the options that take a value."""
    found = []
    for command in ("attr-build", "eval", "merge", "steer", "train"):
        group: Any = typer.main.get_command(build_app([command]))
        for option in group.commands[command].params:
            takes_value = not getattr(option, "is_flag", False) and option.opts[0].startswith("--")
            if takes_value and option.name not in ("config", "model", "adapter", "data"):
                found.append((command, option.opts[0]))
    assert len(found) > 50
    return sorted(found)


@fuzz(
    st.deferred(lambda: st.sampled_from(flags())),
    inputs.PLAIN | st.lists(st.sampled_from(PARTS), max_size=5).map("".join),
    examples=(
        (("eval", "--batch-size"), "9" * 5000), (("steer", "--top-p"), "nan"), (("steer", "--s"), "inf"),
        (("merge", "--output-dir"), "a\x00b"), (("steer", "--layers"), "\x1b[31m"), (("eval", "--limit"), ""),
        (("steer", "--attribute"), "\x1b[31mred\rError: x"), (("attr-build", "--words"), "[bold]\u202e[/]"),
        (("merge", "--check"), ""),
    ),
)  # fmt: skip
def test_options(option: tuple[str, str], value: str) -> None:
    command, flag = option
    more = (*MODEL, "--data", GOOD / "rows.jsonl", "--output-dir", "out") if command == "train" else ()
    with working_folder() as folder:
        # `merge --check` reads a checkpoint, also with --dry-run.
        reads = more or flag == "--check"
        check((command, "--dry-run", *more, f"{flag}={value}"), folder, {0, 2, 3, 4} if reads else {0, 2})


KEYS = (
    "max_steps", "max-steps", "rank", "lr", "epochs", "layers", "seed", "packing", "output_dir", "opposites", "resume",
    "modle", "config",
)  # fmt: skip
BOMB = "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 10))])


@fuzz(
    as_bytes(inputs.YAML_TEXT | st.dictionaries(st.sampled_from(KEYS), inputs.VALUES, max_size=3).map(json.dumps)),
    examples=(
        (b"a: &a [*a]\n",), (b"seed: 1\nseed: 2\n",), (b"model: !!python/object/apply:os.getpid []\n",),
        (b"- model\n",), (b"max_steps: 1\nmax-steps: 2\n",), (b"data: " + b"[" * 3000,), (b"modle: x\n",),
        (BOMB.encode(),), (b"? [a]\n: b\n",), (b"m: 2020-13-45\n",), (b"m: !!binary ====\n",),
        (b"seed: " + b"9" * 5000,), (b'm: "a\\uD800b"\n',), (b"a: &a {b: 1}\n<<: *a\n",), (b"m: !!int x\n",),
    ),
)  # fmt: skip
def test_config_files(content: bytes) -> None:
    with working_folder() as folder:
        (folder / "config.yaml").write_bytes(content)
        more = ("--dry-run", "--config", "config.yaml", "--format", "json")
        ended = check(("train", *MODEL, "--data", GOOD / "rows.jsonl", *more), folder, {0, 2})
        if b"modle" in content or content.count(b"seed: ") == 2:
            assert ended.code == 2


def _broken(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """Name and damaged content of a file of GOOD."""
    content = (GOOD / name).read_bytes()
    if name.endswith(".safetensors"):
        damaged = inputs.broken_tensors(content)
    elif name.endswith(".json"):
        damaged = as_bytes(inputs.changed(json.loads(content)).map(json.dumps) | inputs.JSON_TEXT | inputs.DEEP)
    else:
        damaged = as_bytes(inputs.LINES) | st.integers(0, len(content)).map(lambda n: content[:n])
    return st.tuples(st.just(name), damaged)


def stored(*names: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """Name and damaged content of one of these files, or of one in these folders."""
    paths = [path for name in names for path in ((GOOD / name).rglob("*") if (GOOD / name).is_dir() else [GOOD / name])]
    files = sorted(str(path.relative_to(GOOD)) for path in paths if path.suffix in (".json", ".jsonl", ".safetensors"))
    return st.sampled_from(files).flatmap(_broken)


@cache
def steered_text() -> str:
    return run((*PROMPT, "--adapter", GOOD / "run"), GOOD).out


USERS = {
    "run": (*PROMPT, "--adapter", "run"),
    "attributes": (*PROMPT, "--attributes", "attributes", "--attribute", "bright"),
    "scores": (*SCORES, "scores", "--resume"),
}


@fuzz(st.deferred(lambda: stored("run/adapter_config.json", "run/adapter_model.safetensors", "attributes", "scores")))
def test_stored_files(file: tuple[str, bytes]) -> None:
    """Files of an adapter and an attribute; scores of an evaluation that is resumed."""
    name, content = file
    place = name.partition("/")[0]
    with working_folder(place) as folder:
        (folder / name).write_bytes(content)
        ended = check(USERS[place], folder, {0, 2, 3, 4}, "scores")
        if name == "run/adapter_config.json" and ended.code == 0:
            # The constants c are data: other values give other texts.
            c = [json.loads(text)["relevance_scale"] for text in (content, (GOOD / name).read_bytes())]
            assert c[0] != c[1] or ended.out == steered_text()


@fuzz(st.deferred(lambda: stored("run/checkpoint-2")))
def test_checkpoints(file: tuple[str, bytes]) -> None:
    """A resumed run gives the adapter of the uninterrupted run, or is refused."""
    name, content = file
    adapter = Path("run/adapter_model.safetensors")
    with working_folder("run") as folder:
        for path in ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "run.json"):
            (folder / "run" / path).unlink(missing_ok=True)
        shutil.rmtree(folder / "run" / "checkpoint-4")
        (folder / name).write_bytes(content)
        ended = check((*TRAIN, "run", "--resume"), folder, {0, 2, 4}, "run")
        assert ended.code or (folder / adapter).read_bytes() == (GOOD / adapter).read_bytes()


@fuzz(st.deferred(lambda: stored("texts.jsonl", "texts.jsonl.settings.json")))
def test_files_of_texts(file: tuple[str, bytes]) -> None:
    """A resumed file of texts has the rows of an uninterrupted one, or is refused and unchanged."""
    name, content = file
    with working_folder("texts.jsonl", "texts.jsonl.settings.json") as folder:
        (folder / name).write_bytes(content)
        before = snapshot(folder)
        ended = check(TEXTS, folder, {0, 2, 3, 4}, "texts.jsonl")
        if ended.code == 0:
            assert (folder / "texts.jsonl").read_bytes() == (GOOD / "texts.jsonl").read_bytes()
        else:
            assert snapshot(folder) == before
