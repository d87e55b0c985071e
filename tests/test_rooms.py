"""The rooms of the package: data flows one way, without circles, in files and functions that fit into a head."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "braces_cli"
# A room imports from rooms on lower floors only; rooms on one floor do not know each other.
FLOORS = [
    {"core.utils"}, {"core.models"}, {"core.method"}, {"core.session"}, {"core.attributes"}, {"data", "scoring"},
    {"training", "export", "steering", "inspection"}, {"evaluation"}, {"cli"},
]  # fmt: skip
LINES, FUNCTION_LINES = 400, 60
FILES = sorted(PACKAGE.rglob("*.py"))


def room(parts: tuple[str, ...]) -> str | None:
    """The room that a module below the package is in; None of what every room may import."""
    name = ".".join(parts[:2]) if parts[:1] == ("core",) else parts[0] if parts else ""
    return name if any(name in floor for floor in FLOORS) else None


def floor(name: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if name in rooms)


def module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Modules of the package that are imported anywhere in a file, as parts below the package."""
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


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_keeps_to_its_room(path: Path) -> None:
    """Imports go to lower floors; no file or function is too long to hold in the head."""
    here = room(module(path))
    for target in imports(TREES[path]):
        there = room(target)
        if here is not None and there is not None and here != there:
            assert floor(there) < floor(here), f"{here} imports {'.'.join(target)}"
    assert path.read_text(encoding="utf-8").count("\n") <= LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno <= FUNCTION_LINES, node.name


def test_no_imports_run_in_a_circle() -> None:
    """Not even those inside functions."""
    known = {module(path) for path in FILES}
    graph = {module(path): {target for target in imports(tree) if target in known} for path, tree in TREES.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(".".join(parts) for parts in error.args[1]))
    assert len(order) == len(known) > 100


def test_every_folder_is_a_room() -> None:
    """Nothing stands outside the picture but data, and the entry points of the package itself."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms = {name.partition(".")[0] for rooms in FLOORS for name in rooms}
    assert folders - rooms == {"assets"}
