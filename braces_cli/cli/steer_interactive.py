"""`braces steer --interactive`: prompts and commands, line by line, from a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from braces_cli.cli.console import print_json_lines
from braces_cli.cli.steer_options import SteerSettings
from braces_cli.cli.streams import note
from braces_cli.core.utils.errors import BracesError, DataError
from braces_cli.core.utils.plain_text import error_text


def run_interactive(settings: SteerSettings) -> None:
    """Answer lines until there are no more, or one says /quit."""
    from braces_cli.core.session import open_session
    from braces_cli.steering.chat_prompts import uses_chat_template
    from braces_cli.steering.interactive import Conversation

    sampling = settings.sampling
    session = open_session(settings.model, settings.adapter, settings.load_options)
    chat = uses_chat_template(session, settings.apply_chat_template)
    conversation = Conversation(
        session, settings.strengths, sampling, folder=settings.attributes, layers=settings.layers, chat=chat
    )
    _say(f"{conversation.shown()}. /help shows the commands, /quit leaves.", settings.quiet)
    drawn = not settings.json and sys.stdout.isatty()
    for line in _lines():
        try:
            answer = _drawn(conversation, line) if drawn else conversation.handle(line)
        except BracesError as error:
            _say(error_text(error.message, error.where, error.hint), False)
            continue
        except KeyboardInterrupt:
            # Stops the text; at the prompt itself it ends the command.
            _say("\nstopped", False)
            continue
        if answer is None:
            return
        if isinstance(answer, str):
            _say(answer, settings.quiet)
        elif settings.json:
            print_json_lines([answer])
        elif not drawn:
            from braces_cli.cli.steer_display import print_rows

            print_rows([answer])


def _drawn(conversation: Any, line: str) -> Any:
    """The same on a terminal: both texts are drawn as they grow."""
    from contextlib import ExitStack

    from braces_cli.cli.steer_display import side_by_side, titled

    with ExitStack() as stack:
        view: list[Any] = []

        def stream(side: str, piece: str) -> None:
            if not view:
                view.append(
                    stack.enter_context(side_by_side(conversation.prompt, lambda: titled(conversation.strengths)))
                )
            view[0](side, piece)

        return conversation.handle(line, stream)


def _lines() -> Iterator[str]:
    """Lines of standard input; one that is too long is skipped, with an error.

    Raises:
        DataError: not UTF-8.
    """
    if not sys.stdin.isatty():
        from braces_cli.steering.prompts import LONGEST

        try:
            for line in iter(lambda: sys.stdin.readline(LONGEST + 1), ""):
                if len(line) <= LONGEST:
                    yield line
                    continue
                what = f"a line of more than {LONGEST:,} characters"
                _say(error_text(what, "standard input", "It is skipped."), False)
                while line and not line.endswith("\n"):
                    line = sys.stdin.readline(LONGEST)
        except UnicodeDecodeError as error:
            what, hint = f"not UTF-8 (byte {error.start})", "Convert it, with iconv for one."
            raise DataError(what, where="standard input", hint=hint) from error
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (history and editing, where the system has it)
    while True:
        try:
            yield input("> ")
        except EOFError:
            note("")
            return


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        note(text)
