"""The command reference, from the texts of `--help`: python -m tests.cli.reference --write"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from braces_cli.cli.main import build_app

FILE = Path(__file__).parents[2] / "recipes" / "docs" / "COMMANDS.md"
_HEAD = """# Commands

Texts of `braces COMMAND --help`, written by `python -m tests.cli.reference --write`.
"""


def command_of(*names: str) -> Any:
    """Return the command with these names, such as `inspect`, `values`."""
    command: Any = typer.main.get_command(build_app())
    for name in names:
        command = command.commands[name]
    return command


def reference() -> str:
    """Return the page as Markdown."""
    root = command_of()
    return "\n".join([_HEAD, *_sections(root, typer.Context(root, info_name="braces"))])


def _sections(group: Any, parent: Any) -> Iterator[str]:
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=name, parent=parent)
        yield _section(command, context)
        if hasattr(command, "commands"):
            yield from _sections(command, context)


def _section(command: Any, context: Any) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## {context.command_path}", "", f"    {usage}", "", " ".join((command.help or "").split()), ""]
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [f"| `{_cell(name)}` | {_cell(said)} |" for name, said in filter(None, records)]
    if rows:
        lines += ["| option | description |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"to {FILE.name}; else to stdout")
    if parser.parse_args().write:
        FILE.write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main()
