"""Steered texts on a terminal: a table that grows, one text as it comes, or two side by side.

`braces steer` without --sweep or --interactive: texts for all prompts, to stdout or into a file.

`braces steer --interactive`: prompts and commands, line by line, from a terminal or a pipe.

`braces steer`: generate text, with or without an adapter, steered by attributes.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import (
    console,
    note,
    print_json,
    print_json_lines,
    print_pairs,
    print_text,
    progress,
    rich_text,
    set_up,
)
from braces_cli.cli.steer_settings import SteerSettings
from braces_cli.core.config import options_of
from braces_cli.core.distributed import is_main, join, world_size
from braces_cli.core.errors import BracesError, ConfigError, DataError
from braces_cli.core.text import error_text

if TYPE_CHECKING:
    from braces_cli.core.attributes.hooks import LayerSteering
    from braces_cli.core.models.generate import TextRequest


def print_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Rows of texts as a table, each line printed as it comes; the unsteered text stands before the steered one.

    Where stdout is no terminal, each text is on a line behind its name.
    """
    from rich import box
    from rich.table import Table

    out, header = console(), True
    for row in rows:
        names = ["prompt", *(["unsteered"] if "unsteered" in row else []), "text"]
        titles = [titled(row["attributes"]) if name == "text" and len(names) == 3 else name for name in names]
        if not out.is_terminal:
            for name, title in zip(names, titles, strict=True):
                print_text(f"{title}: {row[name].strip()}")
            print_text("")
            continue
        # One table a row, all of the same widths: whole ones would need all rows, and all memory.
        table = Table(box=box.SIMPLE_HEAD, show_header=header, show_edge=False, expand=True)
        for name, title in zip(names, titles, strict=True):
            table.add_column(rich_text(title), ratio=1 if name == "prompt" else 2, overflow="fold")
        table.add_row(*(rich_text(row[name].strip()) for name in names))
        out.print(table)
        out.print()
        header = False


def print_texts(rows: Iterable[dict[str, Any]]) -> None:
    """Prompts with their continuations and nothing else, an empty line behind each."""
    for row in rows:
        print_text(f"{row['prompt']}{row['text']}\n")


def titled(attributes: dict[str, float]) -> str:
    """What a steered text is steered by."""
    return ", ".join(f"{name} {s:+g}" for name, s in attributes.items()) or "steered by nothing"


class TextPrinter:
    """Prints one text after another as they are generated, each behind its prompt."""

    def __init__(self) -> None:
        self._request: Any = None

    def write(self, request: Any, piece: str) -> None:
        self._begin(request)
        print_text(piece, end="")

    def run(self, rows: Iterable[dict[str, Any]]) -> None:
        """Draw texts from `rows`, which call `write` meanwhile."""
        for row in rows:
            if self._request is None:  # nothing came, not even half a word
                _print_prompt(row["prompt"])
            print_text("\n")
            self._request = None

    def _begin(self, request: Any) -> None:
        if self._request is None:
            self._request = request
            _print_prompt(request.prompt)


def _print_prompt(prompt: str) -> None:
    out = console()
    if out.is_terminal:
        out.print(rich_text(prompt, "bold"), end="", soft_wrap=True)
    else:
        print_text(prompt, end="")


@contextmanager
def side_by_side(prompt: str, title: Callable[[], str]) -> Iterator[Callable[[str, str], None]]:
    """Yields what takes pieces of the unsteered and of the steered text, and draws both as they grow."""
    from rich import box
    from rich.live import Live
    from rich.table import Table

    texts = {"unsteered": "", "steered": ""}

    def table() -> Any:
        drawn = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        for heading in ("unsteered", title()):
            drawn.add_column(rich_text(heading), ratio=1, overflow="fold")
        drawn.add_row(*(rich_text(prompt, "bold").append(rich_text(text, "not bold")) for text in texts.values()))
        return drawn

    with Live(table(), console=console(), auto_refresh=False, vertical_overflow="visible") as live:

        def write(side: str, piece: str) -> None:
            texts[side] += piece
            live.update(table(), refresh=True)

        yield write


def write_texts(settings: SteerSettings) -> None:
    """Texts for all prompts, to stdout or into `--output`."""
    from braces_cli.steering.prompts import count_prompts, read_prompt_rows
    from braces_cli.steering.texts import row_requests

    # What is wrong with an option or with the first prompt should show before the model is loaded.
    _ = settings.sampling
    if world_size() > 1 and not settings.prompt and not (settings.prompts and settings.prompts.is_file()):
        hint = "Write the prompts into a file."
        raise ConfigError("several processes cannot share one pipe", where="--prompts", hint=hint)
    prompts = read_prompt_rows(settings.prompt, settings.prompts, sys.stdin)
    requests = row_requests(chain([next(prompts)], prompts), settings.strengths, settings.num_samples)
    count = len(settings.prompt) or (count_prompts(settings.prompts) if settings.prompts is not None else None)
    total = None if count is None else count * settings.num_samples
    if settings.output is not None:
        _into_file(settings, requests, total)
        return
    if not is_main():
        deque(_rows(settings, requests, total=total), maxlen=0)
        return
    if settings.json:
        print_json_lines(_rows(settings, requests, total=total))
        return

    if settings.format == "text":
        print_texts(_rows(settings, requests, total=total))
        return
    if (
        sys.stdout.isatty()
        and world_size() == 1
        and not settings.show_unsteered
        and (total == 1 or settings.batch_size == 1)
    ):
        printer = TextPrinter()
        printer.run(_rows(settings, requests, stream=printer.write))
    else:
        print_rows(_rows(settings, requests))


def _into_file(settings: SteerSettings, requests: Iterator[TextRequest], total: int | None) -> None:
    from braces_cli.core.files import output_lock

    assert settings.output is not None
    with output_lock(settings.output):
        _append(settings, settings.output, requests, total)


def _append(settings: SteerSettings, output: Path, requests: Iterator[TextRequest], total: int | None) -> None:
    from braces_cli.steering.output import FILES, TextsFile

    options = options_of(type(settings))
    record = {name: value for name, value in settings.resolved().items() if options[name].outcome}
    record[FILES] = _hashes(settings)
    file = TextsFile(output, record, settings.batch_size, resume=settings.resume, overwrite=settings.overwrite)
    requests = file.remaining(requests, settings.seed)
    start, written = time.monotonic(), 0
    first = next(requests, None)
    if first is not None:
        rows = _rows(settings, chain([first], requests), total=total, done=file.rows)
        # All read what is there; the first process writes, once all of them have generated something.
        written = file.write(rows) if is_main() else sum(1 for _ in rows)
    if not is_main():
        return
    result = {
        "output": str(file.path),
        "texts": file.rows + written,
        "resumed_from": file.rows if settings.resume else None,
        "seconds": time.monotonic() - start,
    }
    if settings.json:
        print_json(result)
    else:
        print_pairs("texts written", result)


def _hashes(settings: SteerSettings) -> list[str]:
    """Hashes of the files besides the base's that the texts come from: the adapter's and the attributes'."""
    from braces_cli.core.adapter.files import CONFIG_FILE, WEIGHTS_FILE, adapter_hash
    from braces_cli.core.attributes.files import attribute_hashes
    from braces_cli.core.files import user_path

    # Of an adapter on the hub nothing is looked up for this.
    adapter = None if settings.adapter is None else user_path(settings.adapter)
    if adapter is not None and not all((adapter / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        adapter = None
    if adapter is None and settings.attributes is None:
        return []
    names = dict.fromkeys([*settings.strengths, *_named(settings)])
    hashes = attribute_hashes(names, [settings.attributes, adapter])
    return hashes if adapter is None else [adapter_hash(adapter), *hashes]


def _named(settings: SteerSettings) -> list[str]:
    """Attributes that rows of the prompts name."""
    from braces_cli.steering.prompts import attribute_names

    return [] if settings.prompts is None else attribute_names(settings.prompts)


def _rows(settings: SteerSettings, requests: Iterator[TextRequest], **details: Any) -> Iterator[dict[str, Any]]:
    """Rows of texts; the model is loaded when the first is asked for.

    Args:
        details: further arguments of `generate_rows`.
    """
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.attributes.hooks import steered, terms_of_rows
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.models.ffn import chosen_layers
    from braces_cli.core.models.load import input_device
    from braces_cli.steering.texts import generate_rows, uses_chat_template

    named = _named(settings)
    session = open_session(settings.model, settings.adapter, settings)
    strengths, quiet = settings.strengths, settings.quiet or not is_main()
    processes = join(input_device(session.base.model))
    with progress(quiet) as report:
        find = cache(partial(find_attribute, session, folder=settings.attributes, report=report))
        for name in (*strengths, *named):
            find(name)
    layers = chosen_layers(session.base.model, settings.layers)
    chat = uses_chat_template(session, settings.apply_chat_template)

    def steering(batch: Sequence[TextRequest]) -> AbstractContextManager[list[LayerSteering]]:
        return steered(session, terms_of_rows(find, [request.attributes for request in batch]), layers)

    with steered(session, terms_of_rows(find, [strengths]), layers) as sizes:
        log_steering_sizes(strengths, sizes)
    # Where texts appear on the terminal they are the progress.
    hidden = quiet or (settings.output is None and sys.stdout.isatty())
    with progress(hidden) as report:
        yield from generate_rows(
            session, requests, settings.sampling, steering=steering, with_unsteered=settings.show_unsteered,
            batch_size=settings.batch_size, chat=chat, report=report, processes=processes, **details,
        )  # fmt: skip


def log_steering_sizes(strengths: dict[str, float], sizes: list[LayerSteering]) -> None:
    """Say in one line on stderr how strong the push is, so that nobody wonders why nothing happens."""
    if not strengths:
        return
    what = ", ".join(f"{name} {value:+g}" for name, value in strengths.items())
    strongest = max(sizes, key=lambda size: size.share, default=None)
    if strongest is None:
        effect = "nothing is added, the text is that of the unsteered model"
    else:
        effect = f"the added vector is {strongest.share:.1%} of the residual stream at most (layer {strongest.layer})"
    logging.getLogger("braces").info("%s: %s", what, effect)


def run_interactive(settings: SteerSettings) -> None:
    """Answer lines until there are no more, or one says /quit."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.steering.interactive import Conversation
    from braces_cli.steering.texts import uses_chat_template

    sampling = settings.sampling
    session = open_session(settings.model, settings.adapter, settings)
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
            print_rows([answer])


def _drawn(conversation: Any, line: str) -> Any:
    """The same on a terminal: both texts are drawn as they grow."""
    from contextlib import ExitStack

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


@command
def steer(settings: SteerSettings) -> None:
    """Generate text from prompts, steered along attributes by strength s (negative: away from them)."""
    set_up(settings.quiet or not is_main(), settings.debug)
    if settings.dry_run:
        show_plan(settings)
        return
    if settings.sweep is not None:
        from braces_cli.cli.sweep import run_sweep
        from braces_cli.core.files import output_lock

        with output_lock(settings.plot):
            run_sweep(settings)
    elif settings.interactive:
        if world_size() > 1:
            hint = "Leave out torchrun or accelerate launch."
            raise ConfigError("a conversation is for one process", where="--interactive", hint=hint)

        run_interactive(settings)
    else:
        write_texts(settings)
