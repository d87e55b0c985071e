"""`braces steer`: generate texts from prompts, steered by attributes; to stdout, into a file, or in a conversation."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import console, note, print_json_lines, print_result, print_text, progress, rich_text
from braces_cli.core.config import SETTINGS_FILE, options_of, write_settings
from braces_cli.core.distributed import is_main, join, world_size
from braces_cli.core.errors import BracesError, ConfigError, DataError, logger
from braces_cli.core.files import file_hash, output_lock, user_path
from braces_cli.core.text import error_text
from braces_cli.steering.settings import SteerSettings

if TYPE_CHECKING:
    from braces_cli.core.attributes.hooks import LayerSteering
    from braces_cli.core.models.generate import TextRequest
    from braces_cli.steering.interactive import Conversation


@command
def steer(settings: SteerSettings) -> None:
    """Generate text from prompts, steered along attributes by strength s (negative: away from them)."""
    if settings.dry_run:
        show_plan(settings)
    elif settings.sweep is not None:
        from braces_cli.cli.sweep import run_sweep

        with output_lock(settings.plot), output_lock(settings.output):
            run_sweep(settings)
    elif settings.interactive:
        if world_size() > 1:
            hint = "Leave out torchrun or accelerate launch."
            raise ConfigError("a conversation is for one process", where="--interactive", hint=hint)
        run_interactive(settings)
    else:
        write_texts(settings)


def write_texts(settings: SteerSettings) -> None:
    """Generate texts for all prompts, to stdout or into `--output`."""
    from braces_cli.steering.prompts import count_prompts, read_prompt_rows
    from braces_cli.steering.texts import row_requests

    if world_size() > 1 and not settings.prompt and not (settings.prompts and settings.prompts.is_file()):
        hint = "Write the prompts into a file."
        raise ConfigError("several processes cannot share one pipe", where="--prompts", hint=hint)
    prompts = read_prompt_rows(settings.prompt, settings.prompts, sys.stdin)
    # The first prompt is read here, so that its errors come before the model is loaded.
    requests = row_requests(chain([next(prompts)], prompts), settings.strengths, settings.num_samples)
    count = len(settings.prompt) or count_prompts(settings.prompts)
    total = None if count is None else count * settings.num_samples
    if settings.output is not None:
        with output_lock(settings.output):
            _write_file(settings, settings.output, requests, total)
        return
    rows = partial(_rows, settings, requests)
    if not is_main():
        deque(rows(total=total), maxlen=0)
    elif settings.json:
        print_json_lines(rows(total=total))
    elif settings.format == "text":
        print_texts(rows(total=total))
    elif (
        sys.stdout.isatty()
        and world_size() == 1
        and not settings.show_unsteered
        and (total == 1 or settings.batch_size == 1)
    ):
        print_stream(rows)
    else:
        print_rows(rows())


def _write_file(settings: SteerSettings, output: Path, requests: Iterator[TextRequest], total: int | None) -> None:
    """Generate the texts that `--output` does not have yet, append them, and print a summary."""
    from braces_cli.core.adapter.files import CONFIG_FILE, WEIGHTS_FILE, adapter_hash
    from braces_cli.core.attributes.files import attribute_hashes
    from braces_cli.steering.output import FILES, TextsFile
    from braces_cli.steering.prompts import attribute_names

    # Adapters from the hub are not hashed.
    adapter = None if settings.adapter is None else user_path(settings.adapter)
    if adapter is not None and not all((adapter / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        adapter = None
    names = dict.fromkeys([*settings.strengths, *settings.erase, *attribute_names(settings.prompts)])
    hashes = [] if adapter is None else [adapter_hash(adapter)]
    options = options_of(type(settings))
    record = {name: value for name, value in settings.resolved().items() if options[name].outcome}
    record[FILES] = hashes + attribute_hashes(names, [settings.attributes, adapter])
    file = TextsFile(output, record, settings.batch_size, resume=settings.resume, overwrite=settings.overwrite)
    requests = file.remaining(requests, settings.seed)
    start, written = time.monotonic(), 0
    first = next(requests, None)
    if first is not None:
        rows = _rows(settings, chain([first], requests), total=total, done=file.rows)
        # All processes read the file; the first one writes after all have generated texts.
        written = file.write(rows) if is_main() else sum(1 for _ in rows)
    if not is_main():
        return
    result = {
        "output": str(file.path),
        "texts": file.rows + written,
        "resumed_from": file.rows if settings.resume else None,
        "seconds": time.monotonic() - start,
    }
    print_result(settings.json, "texts written", result)


def _rows(settings: SteerSettings, requests: Iterator[TextRequest], **details: Any) -> Iterator[dict[str, Any]]:
    """Yield rows of texts; the model is loaded for the first one.

    Args:
        details: other arguments of `generate_rows`.
    """
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.attributes.hooks import erased_directions, layer_steering, remaining, steered, terms_of_rows
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.models.ffn import chosen_layers
    from braces_cli.core.models.load import input_device
    from braces_cli.steering.prompts import attribute_names
    from braces_cli.steering.texts import generate_rows, uses_chat_template

    named = attribute_names(settings.prompts)
    session = open_session(settings.model, settings.adapter, settings)
    strengths, quiet = settings.strengths, settings.quiet or not is_main()
    processes = join(input_device(session.base.model))
    with progress(quiet) as report:
        find = cache(partial(find_attribute, session, folder=settings.attributes, report=report))
        for name in (*strengths, *named):
            find(name)
    layers = chosen_layers(session.base.model, settings.layers)
    erase = erased_directions(session, [find(name, for_steering=False) for name in settings.erase], layers)
    chat = uses_chat_template(session, settings.uses_template)

    def steering(batch: Sequence[TextRequest]) -> AbstractContextManager[list[LayerSteering]]:
        terms = terms_of_rows(find, [request.attributes for request in batch])
        return steered(session, terms, layers, settings.scope, erase)

    if erase:
        layer, share = max(remaining(session, erase, settings.scope).items())
        what = "%s erased; %.1f%% of it remains in the residual stream after layer %d"
        logger.info(what, ", ".join(settings.erase), 100 * share, layer)

    if strengths:
        what = ", ".join(f"{name} {value:+g}" for name, value in strengths.items())
        added = layer_steering(session, terms_of_rows(find, [strengths]), layers)
        effect = "nothing is added, the text is that of the unsteered model"
        if added:
            largest = max(added, key=lambda each: each.share)
            effect = f"the added vector is {largest.share:.1%} of the residual stream at most (layer {largest.layer})"
        logger.info("%s: %s", what, effect)
    # Texts on the terminal replace the progress.
    hidden = quiet or (settings.output is None and sys.stdout.isatty())
    with progress(hidden) as report:
        rows = generate_rows(
            session, requests, settings.sampling, steering=steering, with_unsteered=settings.show_unsteered,
            batch_size=settings.batch_size, chat=chat, report=report, processes=processes, **details,
        )  # fmt: skip
        for count, row in enumerate(rows):
            if count == 0 and settings.output is not None and is_main():
                place, prompts = settings.output.with_name(f"{settings.output.name}.{SETTINGS_FILE}"), settings.prompts
                data = None if prompts is None else file_hash(prompts, DataError)
                write_settings(place, settings, base=session.base.digest, data=data)
            if chat and settings.format == "text":  # question and answer, not one text
                row["prompt"] += "\n"
            yield row


def print_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Print rows of texts as a table that grows; if stdout is not a terminal, as lines `NAME: TEXT`."""
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
        # One table per row, all with the same column widths: a single table would need all rows first.
        table = Table(box=box.SIMPLE_HEAD, show_header=header, show_edge=False, expand=True)
        for name, title in zip(names, titles, strict=True):
            table.add_column(rich_text(title), ratio=1 if name == "prompt" else 2, overflow="fold")
        table.add_row(*(rich_text(row[name].strip()) for name in names))
        out.print(table)
        out.print()
        header = False


def print_texts(rows: Iterable[dict[str, Any]]) -> None:
    """Print prompts with their continuations, an empty line after each."""
    for row in rows:
        print_text(f"{row['prompt']}{row['text']}\n")


def titled(attributes: dict[str, float]) -> str:
    """Return the title of a steered text."""
    return ", ".join(f"{name} {s:+g}" for name, s in attributes.items()) or "no attribute"


def print_stream(generate: Callable[..., Iterable[dict[str, Any]]]) -> None:
    """Print the texts of `generate` one after another while they are generated, each after its prompt."""
    printed: list[TextRequest] = []

    def write(request: TextRequest, piece: str) -> None:
        if request not in printed[-1:]:
            console().print(rich_text(request.prompt, "bold"), end="", soft_wrap=True)
            printed.append(request)
        print_text(piece, end="")

    for row in generate(stream=write):
        print_text("\n" if row["text"] else f"{row['prompt']}\n")  # an empty text has no pieces


def run_interactive(settings: SteerSettings) -> None:
    """Answer lines until the input ends or a line is /quit."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.steering.interactive import Conversation
    from braces_cli.steering.texts import uses_chat_template

    session = open_session(settings.model, settings.adapter, settings)
    chat = uses_chat_template(session, settings.uses_template)
    conversation = Conversation(
        session,
        settings.strengths,
        settings.sampling,
        folder=settings.attributes,
        layers=settings.layers,
        scope=settings.scope,
        erase=settings.erase,
        chat=chat,
    )
    if not settings.quiet:
        note(f"{conversation.shown()}. /help shows the commands, /quit leaves.")
    live = not settings.json and sys.stdout.isatty()
    for line in _lines():
        try:
            answer = _live_answer(conversation, line) if live else conversation.handle(line)
        except BracesError as error:
            note(error_text(error.message, error.where, error.hint))
            continue
        except KeyboardInterrupt:
            # Stops the text; at the prompt it ends the command.
            note("\nstopped")
            continue
        if answer is None:
            return
        if isinstance(answer, str):
            if not settings.quiet:
                note(answer)
        elif settings.json:
            print_json_lines([answer])
        elif not live:
            print_rows([answer])


def _live_answer(conversation: Conversation, line: str) -> dict[str, Any] | str | None:
    """Return the answer to a line; on the terminal both texts are drawn while they grow."""
    from rich import box
    from rich.live import Live
    from rich.table import Table

    texts = {"unsteered": "", "steered": ""}
    live = Live(console=console(), auto_refresh=False, vertical_overflow="visible")

    def draw(side: str, piece: str) -> None:
        texts[side] += piece
        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        for heading in ("unsteered", titled(conversation.strengths)):
            table.add_column(rich_text(heading), ratio=1, overflow="fold")
        prompt = conversation.prompt or ""
        table.add_row(*(rich_text(prompt, "bold").append(rich_text(text, "not bold")) for text in texts.values()))
        live.start()  # no effect after the first piece
        live.update(table, refresh=True)

    try:
        return conversation.handle(line, draw)
    finally:
        live.stop()


def _lines() -> Iterator[str]:
    """Yield lines of standard input."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (history and editing, if available)
        while True:
            try:
                yield input("> ")
            except EOFError:
                note("")
                return
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        hint = "Convert it, for example with iconv."
        raise DataError(f"not UTF-8 (byte {error.start})", where="standard input", hint=hint) from error
