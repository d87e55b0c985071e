"""The layout of the package: imports in one direction without cycles; limits on lines of files and functions."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.windows import MISSING_MODULES, MISSING_NAMES, SIGNALS

PACKAGE = Path(__file__).parents[1] / "braces_cli"
# A package imports from packages on earlier lines only.
LEVELS = [
    ["core"], ["core.models"], ["core.adapter"], ["core.attributes"], ["data", "scoring"],
    ["training", "export", "steering", "inspection"], ["evaluation"], ["cli"],
]  # fmt: skip
LINES, FUNCTION_LINES = 700, 80
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def level(parts: tuple[str, ...]) -> tuple[int, str] | None:
    """Level and name of the package that a module is in; None for the entry points at the top."""
    names = [".".join(parts[:length]) for length in (2, 1)]
    return next(((i, name) for name in names for i, level in enumerate(LEVELS) if name in level), None)


def module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere, as parts relative to the package."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            head, *rest = name.split(".")
            if head == PACKAGE.name and rest:
                yield tuple(rest)


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_uses_nothing_that_windows_lacks(path: Path) -> None:
    """Modules of POSIX are imported in `try`, with another way after ImportError."""
    tries = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Try)]
    handled = [node for node in tries if any("ImportError" in ast.unparse(each) for each in node.handlers)]
    guarded = [each for node in handled for each in node.body]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import) and any(alias.name in MISSING_MODULES for alias in node.names):
            assert node in guarded, ast.unparse(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "signal"):
            assert node.attr not in MISSING_NAMES, ast.unparse(node)
            assert not node.attr.startswith("SIG") or node.attr in SIGNALS, ast.unparse(node)


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_follows_the_layout(path: Path) -> None:
    """Imports from earlier levels only; limits on the lines of the file and its functions."""
    here = level(module(path))
    for target in imports(TREES[path]):
        there = level(target)
        if here and there and here[1] != there[1]:
            assert there[0] < here[0], f"{here[1]} imports {'.'.join(target)}"
    assert path.read_text(encoding="utf-8").count("\n") <= LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, node.name


def test_no_import_cycles() -> None:
    """Imports inside functions count."""
    known = {module(path) for path in TREES}
    graph = {module(path): {target for target in imports(tree) if target in known} for path, tree in TREES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(".".join(parts) for parts in error.args[1]))


def test_every_folder_has_a_level() -> None:
    """Except `assets`, which is data."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {name.partition(".")[0] for level in LEVELS for name in level} | {"assets"}
