"""Random mutations of the package, and the share that its tests do not notice.

    python recipes/studies/mutations.py --count 100 --seed 0 --output mutations.jsonl

A mutation is one change of one expression in `core`, `training` or `export`: a flipped comparison, a number one larger,
a term left out, two arguments swapped. Each runs on a copy of the checkout, in a process forked from one that has
imported torch and transformers, with the test files of its module (its own file first), until the first failure.
Results are appended to the output; a run that is started again leaves out what it holds.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("core", "training", "export")
FLIPPED = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
FLIPPED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}


def changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Kind and new text of every mutation of a node itself."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPPED:
        ops = [FLIPPED[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", ast.unparse(ast.Compare(node.left, ops, node.comparators))
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "number", repr(node.value + 1)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        yield "term", ast.unparse(node.left)
    elif isinstance(node, ast.BoolOp):
        yield "term", ast.unparse(ast.BoolOp(node.op, node.values[:-1]) if len(node.values) > 2 else node.values[0])
    elif isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
        swapped = [node.args[1], node.args[0], *node.args[2:]]
        yield "arguments", ast.unparse(ast.Call(node.func, swapped, node.keywords))


def expressions(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node outside annotations, f-strings and the messages of errors and logs."""
    for name, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            skipped = name in ("annotation", "returns") or isinstance(child, (ast.JoinedStr, ast.Raise, ast.Import))
            logs = isinstance(child, ast.Call) and ast.unparse(child.func).startswith(("logger.", "report"))
            if isinstance(child, ast.AST) and not skipped and not logs:
                yield child
                yield from expressions(child)


def sites(path: Path) -> Iterator[dict[str, object]]:
    """Mutations of a module: file, line, kind, old and new text, and where the old text is in bytes."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in expressions(ast.parse(source)):
        for kind, new in changes(node):
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            old = source[begin:end].decode()
            about = {"file": str(path.relative_to(ROOT)), "line": node.lineno, "kind": kind}
            yield {**about, "old": old, "new": f"({new})", "begin": begin, "end": end}


def covering(file: str) -> list[str]:
    """Test files of a module: its own, those of its folder, of `tests/core` for a folder there, and of `train`."""
    module = Path(file).relative_to("braces_cli")
    folder = ROOT / "tests" / module.parent
    found = [folder / f"test_{module.name}", *sorted(folder.glob("test_*.py"))]
    found += sorted(folder.parent.glob("test_*.py")) if folder.parent.name == "core" else []
    found += [ROOT / "tests" / "cli" / "test_train.py"] if module.parts[0] != "export" else []
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys(found) if path.exists()]


def run(mutation: dict[str, object], copy: Path, limit: float) -> str:
    """Name of the first test that fails, "timeout", or "" for a survivor."""
    target = copy / str(mutation["file"])
    original, log = target.read_bytes(), copy / "mutation.log"
    target.write_bytes(original[: mutation["begin"]] + str(mutation["new"]).encode() + original[mutation["end"] :])
    child = os.fork()
    if not child:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        import pytest

        options = ("-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=line")
        os._exit(pytest.main([*options, *covering(str(mutation["file"]))]))
    ended, status, until = 0, 0, time.monotonic() + limit
    while not ended and time.monotonic() < until:
        time.sleep(0.2)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    target.write_bytes(original)
    failed = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "timeout" if not ended else "" if status == 0 else (failed or ["does not import"])[0][:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of one mutation")
    parser.add_argument("--copy", type=Path, required=True, help="copy of the checkout, which is changed")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    modules = [path for part in PARTS for path in sorted((ROOT / "braces_cli" / part).rglob("*.py"))]
    every = [site for path in modules for site in sites(path)]
    drawn = random.Random(options.seed).sample(every, options.count)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = [json.loads(line) for line in lines]
    import peft  # noqa: F401  in the parent, so that a child starts in no time
    import pytest  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    with options.output.open("a") as file:
        for mutation in drawn:
            if any(all(each[key] == mutation[key] for key in mutation) for each in done):
                continue
            started = time.monotonic()
            mutation["caught_by"] = run(mutation, options.copy.resolve(), options.limit)
            mutation["seconds"] = round(time.monotonic() - started, 1)
            print(json.dumps(mutation), file=file, flush=True)


if __name__ == "__main__":
    main()
