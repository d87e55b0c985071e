"""`braces steer --interactive`: prompts and commands, line by line, from a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json_lines
from braces_cli.cli.steer_texts import open_base, sampling_of
from braces_cli.core.utils.errors import BracesError, ConfigError

_TAKES_NO = ("prompt", "prompts", "output", "resume", "overwrite")


def converse(ctx: typer.Context, asked: dict[str, float], fmt: o.Format) -> None:
    """Answer lines until there are no more, or one says /quit."""
    p = ctx.params
    for name in _TAKES_NO:
        if p[name]:
            raise ConfigError("does not go with --interactive", where=f"--{name}", hint="Leave one of them out.")
    if p["num_samples"] > 1:
        raise ConfigError("does not go with --interactive", where="--num-samples", hint="/seed draws another text.")
    sampling = sampling_of(ctx)

    from braces_cli.steering.chat_prompts import chat_wanted
    from braces_cli.steering.interactive import Conversation

    session = open_base(ctx)
    chat = chat_wanted(session, p["apply_chat_template"])
    talk = Conversation(session, asked, sampling, folder=p["attributes"], layers=p["layers"], chat=chat)
    _say(f"{talk.shown()}. /help shows the commands, /quit leaves.", p["quiet"])
    drawn = fmt is o.Format.table and sys.stdout.isatty()
    for line in _lines():
        try:
            answer = _drawn(talk, line) if drawn else talk.handle(line)
        except BracesError as error:
            _say(f"Error: {error}", False)
            continue
        except KeyboardInterrupt:
            # Stops the text; at the prompt itself it ends the command.
            _say("\nstopped", False)
            continue
        if answer is None:
            return
        if isinstance(answer, str):
            _say(answer, p["quiet"])
        elif fmt is o.Format.json:
            print_json_lines([answer])
        elif not drawn:
            from braces_cli.cli.steer_display import print_rows

            print_rows([answer])


def _drawn(talk: Any, line: str) -> Any:
    """The same on a terminal: both texts are drawn as they grow."""
    from contextlib import ExitStack

    from braces_cli.cli.steer_display import side_by_side, titled

    with ExitStack() as stack:
        view: list[Any] = []

        def stream(side: str, piece: str) -> None:
            if not view:
                view.append(stack.enter_context(side_by_side(talk.prompt, lambda: titled(talk.strengths))))
            view[0](side, piece)

        return talk.handle(line, stream)


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (history and editing, where the system has it)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)
