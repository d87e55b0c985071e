"""The command reference has the texts of `--help`."""

import ast
from collections import defaultdict
from pathlib import Path

import braces_cli
from braces_cli.core.config import Settings, options_of
from tests.cli.reference import FILE, reference

# Functions that check or record every setting.
NOT_READING = {"check", "_check_method_and_attributes", "__post_init__", "unused", "resolved", "recorded", "identity"}


def test_the_command_reference_is_current():
    assert FILE.read_text(encoding="utf-8") == reference(), "run: python -m tests.cli.reference --write"


def test_every_option_has_a_help_text():
    """A field without an entry in the docstring of its settings class would have a default only."""
    for line in reference().splitlines():
        assert "| Default: " not in line
        assert not line.endswith("|  |")


def leaves(kind):
    return [leaf for each in kind.__subclasses__() for leaf in leaves(each)] or [kind]


def test_every_option_is_read():
    """By a module that names the settings of its command or one of their bases, outside of checks and records."""
    found = defaultdict(set)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(braces_cli.__file__).parent.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    # Class -> types of its fields: `context: TaskContext` gives access to `context.settings`.
    held = {k.name: {ast.unparse(f.annotation) for f in k.body if isinstance(f, ast.AnnAssign)} for k in classes}
    for nodes in ([*ast.walk(tree)] for tree in trees):
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        names = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        types = [ast.unparse(node.annotation) for node in nodes if getattr(node, "annotation", None)]
        names |= {each.rpartition(".")[2] for each in types}
        inside = [node for each in functions if each.name not in NOT_READING for node in ast.walk(each)]
        for name in names.union(*(held.get(name, ()) for name in names)):
            found[name] |= {node.attr for node in inside if isinstance(node, ast.Attribute)}
    kinds = [kind for kind in leaves(Settings) if kind.__module__.startswith("braces_cli.")]
    assert len(kinds) > 15
    # `main` reads these two in the words of the command line, before there are settings.
    unread = {
        (kind.__name__, name)
        for kind in kinds
        for name in options_of(kind).keys() - {"debug", "quiet"}
        if all(name not in found[base.__name__] for base in kind.__mro__)
    }
    # `open_shape` reads this one; its argument has no type.
    assert unread == {("SummarySettings", "allow_other_base")}
