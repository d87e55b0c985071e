"""Every schema of a file: any content is of the schema's type, or an error of its class that says where."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hypothesis import strategies as st

from braces_cli.core.schema import Kind, parse
from tests.fuzz.budget import attempt, fuzz
from tests.fuzz.inputs import JSON_TEXT, PLAIN, VALUES, as_bytes

PACKAGE = Path(__file__).parents[2] / "braces_cli"
LONGEST = 500


@functools.cache
def kinds() -> dict[str, Kind[Any]]:
    """Every kind of file that a module declares at its top, by module and name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if not any("Kind(" in ast.unparse(node) for node in _assignments(path)):
            continue
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        found.update({f"{path.stem}.{name}": v for name, v in vars(module).items() if isinstance(v, Kind)})
    return found


def _assignments(path: Path) -> list[ast.stmt]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))]


def names(schema: Any) -> list[str]:
    """Keys that a schema knows, also those of the schemas inside."""
    if dataclasses.is_dataclass(schema) or isinstance(getattr(schema, "__annotations__", None), dict):
        hints = get_type_hints(schema)
        return [*hints, *(name for hint in hints.values() for name in names(hint))]
    return [name for inner in get_args(schema) if not isinstance(inner, (int, str)) for name in names(inner)]


def documents(kind: Kind[Any]) -> st.SearchStrategy[bytes]:
    """Files of a kind: objects with its keys and any values, lists of them, and text of any sort."""
    known = sorted(set(names(kind.schema)))
    keys = st.sampled_from(known) | PLAIN if known else PLAIN
    objects = st.dictionaries(keys, st.dictionaries(keys, VALUES, max_size=3) | VALUES, max_size=6)
    return as_bytes(st.one_of(objects.map(json.dumps), st.lists(objects, max_size=2).map(json.dumps), JSON_TEXT))


def test_the_schemas_are_found() -> None:
    """The search below must see them: it is not silently empty."""
    assert len(kinds()) > 20
    assert any("layers" in names(kind.schema) for kind in kinds().values())


def _files() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.one_of(*(st.tuples(st.just(name), documents(kind)) for name, kind in kinds().items()))


@fuzz(st.deferred(_files))
def test_any_content_is_of_the_type_or_an_error_of_the_class(chosen: tuple[str, bytes]) -> None:
    name, content = chosen
    kind = kinds()[name]
    value, error = attempt(lambda: parse(kind, content, "file.json"), kind.error)
    if error:
        assert type(error) is kind.error
        assert error.where.startswith("file.json")
        assert error.hint
        assert error.message
        assert len(error.message) < LONGEST
        return
    if dataclasses.is_dataclass(kind.schema):
        assert isinstance(value, kind.schema)
