"""The maintainers' pages name what is in the tree, and leave out no room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "recipes" / "docs" / "ARCHITECTURE.md"
PAGES = [PAGE, ROOT / "CONTRIBUTING.md"]
# A file of Python or of text, or a folder, between backticks; or a module after `python -m`.
_PATH = re.compile(r"`([\w./-]+(?:\.(?:py|md|yaml)|/))`")
_MODULE = re.compile(r"python -m (tests\.[\w.]+)")


def rooms() -> set[str]:
    """Folders of the package that hold modules, relative to it."""
    package = ROOT / "braces_cli"
    folders = {file.parent.relative_to(package) for file in package.rglob("*.py")}
    # `core` and the package itself are described by what is in them.
    return {f"{folder}/" for folder in folders if folder.name and str(folder) != "core"}


def exists(name: str) -> bool:
    """Whether a name is that of a file or folder, from the root or from the package."""
    return any((root / name).exists() for root in (ROOT, ROOT / "braces_cli"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_room_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(_PATH.findall(text)) | {f"{module.replace('.', '/')}.py" for module in _MODULE.findall(text)}
    assert len(names) > 5
    assert {name for name in names if not exists(name)} == set()


def test_no_room_is_missing() -> None:
    described = set(re.findall(r"^\| `([\w/]+/)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert described == rooms()


def test_every_room_of_the_package_has_a_room_of_tests() -> None:
    without = {"core/utils/", "assets/"}
    assert {room for room in rooms() - without if not (ROOT / "tests" / room).is_dir()} <= {"training/checkpointing/"}
