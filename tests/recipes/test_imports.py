"""Imports of the recipes, also those inside functions, match the package."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.py")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_imported_names_exist(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "braces_cli":
                    import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "braces_cli":
            missing += [f"{node.module}.{alias.name}" for alias in node.names if not exists(node.module, alias.name)]
    assert missing == []


def exists(module: str, name: str) -> bool:
    try:
        if hasattr(import_module(module), name):
            return True
        import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True
