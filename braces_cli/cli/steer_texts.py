"""`braces steer` without --sweep or --interactive: texts for all prompts, to stdout or into a file."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.cli.console import print_json, print_json_lines, print_pairs, progress
from braces_cli.cli.steer_options import SteerSettings
from braces_cli.core.utils.distributed import is_main, join_all, world_size
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import options_of

if TYPE_CHECKING:
    from braces_cli.core.attributes.intervention import SteeringSize
    from braces_cli.core.models.generation import TextRequest


def write_texts(settings: SteerSettings) -> None:
    """Texts for all prompts, to stdout or into `--output`."""
    from braces_cli.steering.generate_texts import row_requests
    from braces_cli.steering.prompts import count_prompts, read_prompt_rows

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
    from braces_cli.cli.steer_display import TextPrinter, print_rows, print_texts

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
    from braces_cli.core.utils.output_lock import output_lock

    assert settings.output is not None
    with output_lock(settings.output):
        _append(settings, settings.output, requests, total)


def _append(settings: SteerSettings, output: Path, requests: Iterator[TextRequest], total: int | None) -> None:
    from braces_cli.steering.resumable_output import FILES, TextsFile

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
    from braces_cli.core.attributes.listing import attribute_hashes
    from braces_cli.core.method.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_hash
    from braces_cli.core.utils.paths import user_path

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
    from braces_cli.core.attributes.intervention import steered, terms_of_rows
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.models.loading import input_device
    from braces_cli.core.session import open_session
    from braces_cli.steering.chat_prompts import uses_chat_template
    from braces_cli.steering.generate_texts import generate_rows

    named = _named(settings)
    session = open_session(settings.model, settings.adapter, settings.load_options)
    strengths, quiet = settings.strengths, settings.quiet or not is_main()
    processes = join_all(input_device(session.base.model))
    with progress(quiet) as report:
        find = cache(partial(find_attribute, session, folder=settings.attributes, report=report))
        for name in (*strengths, *named):
            find(name)
    layers = chosen_layers(session.base.model, settings.layers)
    chat = uses_chat_template(session, settings.apply_chat_template)

    def steering(batch: Sequence[TextRequest]) -> AbstractContextManager[list[SteeringSize]]:
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


def log_steering_sizes(strengths: dict[str, float], sizes: list[SteeringSize]) -> None:
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
