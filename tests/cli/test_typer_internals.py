"""What braces uses of typer without typer documenting it: each name is still there."""

from __future__ import annotations

import pytest
import typer

from braces_cli.cli import options
from braces_cli.cli.main import build_app


def caught(*args):
    """The error of a wrong call."""
    with pytest.raises(typer.TyperException) as error:
        build_app(args)(args=list(args), standalone_mode=False)
    return error.value


def test_a_command_and_its_context_are_found():
    """`commands`, `get_help`, `params` with `name` and `opts`, and the path of the command."""
    command, context = options.help_of(build_app(), ["attr-build"])
    assert context.command_path == "braces attr-build"
    assert callable(command.get_help)
    folder = options.parameters(context)["output_dir"]
    assert (folder.name, folder.opts) == ("output_dir", ["--output-dir", "--attributes"])
    assert options.help_of(build_app(), ["attr-build", "more"]) is None


def test_errors_of_a_call_are_told_apart():
    """By the class name and by the context that the error carries."""
    assert options.is_call_without_arguments(caught())
    wrong = caught("steer", "--nope")
    assert not options.is_call_without_arguments(wrong)
    assert wrong.ctx.command_path == options.called_command(wrong)
    assert options.called_command(wrong).endswith("steer")


def test_an_unknown_option_is_told_with_what_the_command_has():
    """`option_name` and `message`."""
    name, message, known = options.unknown_option(caught("train", "--learning-rate", "1"))
    assert (name, message) == ("--learning-rate", "No such option: --learning-rate")
    assert {"lr", "batch_size"} <= known
    assert options.unknown_option(caught("train", "--rank", "many")) is None


@pytest.mark.parametrize("option", ["-ngl", "-np", "-fa"])
def test_letters_that_stand_together_are_not_taken_for_one_of_them(braces, option):
    """The parser names the first letter alone; these are options of llama.cpp that have no counterpart here."""
    outcome = braces("steer", option, "9", "--prompt", "a")
    assert outcome.code == 2
    assert "here it is" not in outcome.err
    assert "here it is --max-new-tokens" in braces("steer", "-n", "9", "--prompt", "a").err
    assert "here it is --max-new-tokens" in braces("steer", "--n_predict=9", "--prompt", "a").err


def test_where_a_value_was_given():
    """`get_parameter_source` and `default_map`."""
    app, seen = typer.Typer(), {}

    @app.command()
    def show(ctx: typer.Context, a: int = 0, b: int = 0, c: int = 0) -> None:
        seen.update(options.sources(ctx, ("a", "b", "c")), values=(a, b, c))

    @app.callback()
    def root(ctx: typer.Context) -> None:
        options.set_defaults(ctx, {"show": {"b": 7}})

    app(args=["show", "--a", "5"], standalone_mode=False)
    assert seen == {"a": "command line", "b": "file", "values": (5, 7, 0)}


def test_repeatable_parameters_are_told_by_multiple_and_nargs():
    """`multiple` of an option, `nargs` of an argument."""
    _, train = options.help_of(build_app(), ["train"])
    _, find = options.help_of(build_app(), ["inspect", "find"])
    known = options.parameters(train)
    assert options.is_repeatable(known["data"])
    assert not options.is_repeatable(known["rank"])
    assert options.is_repeatable(options.parameters(find)["words"])
