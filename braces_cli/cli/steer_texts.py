"""What `braces steer` does with its options: texts to stdout or into a file, or a conversation."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_json_lines, print_pairs, progress
from braces_cli.core.utils.errors import ConfigError

if TYPE_CHECKING:
    from braces_cli.core.attributes.intervention import Push
    from braces_cli.core.models.generation import Job, Sampling
    from braces_cli.core.session import Session

# What a text depends on besides its prompt, by the names of the command's parameters.
_TEXT_DEPENDS_ON = (
    "attribute", "s", "model", "adapter", "attributes", "layers", "max_new_tokens", "temperature", "top_p", "top_k",
    "num_samples", "stop", "apply_chat_template", "beside", "seed", "revision", "dtype", "quantize",
)  # fmt: skip


def sampling_of(ctx: typer.Context) -> Sampling:
    """How the command's options say that tokens are drawn."""
    from braces_cli.core.models.generation import Sampling

    p = ctx.params
    stop = tuple(p["stop"] or ())
    return Sampling(p["max_new_tokens"], p["temperature"], p["top_p"], p["top_k"], p["seed"], stop)


def generate_texts(ctx: typer.Context, asked: dict[str, float], fmt: o.Format) -> None:
    """Texts for all prompts, to stdout or into `--output`."""
    from braces_cli.steering.generate_texts import jobs_of
    from braces_cli.steering.prompts import count_prompts, read_prompts

    p = ctx.params
    sampling = sampling_of(ctx)
    texts = read_prompts(p["prompt"] or (), p["prompts"], sys.stdin)
    # The first prompt before the model: what is wrong with the source should show before minutes of loading.
    jobs = jobs_of(chain([next(texts)], texts), p["num_samples"])
    count = len(p["prompt"] or ()) or (count_prompts(p["prompts"]) if p["prompts"] is not None else None)
    total = None if count is None else count * p["num_samples"]
    if p["output"] is not None:
        _into_file(ctx, asked, jobs, sampling, total, fmt)
        return
    if p["resume"] or p["overwrite"]:
        raise ConfigError("there is no file to continue", where="--output", hint="Give --output FILE.")
    if fmt is o.Format.json:
        print_json_lines(_rows(ctx, asked, jobs, sampling, total=total))
        return
    from braces_cli.cli.steer_display import Flow, print_rows

    flows = sys.stdout.isatty() and not p["beside"] and (total == 1 or p["batch_size"] == 1)
    if flows:
        flow = Flow()
        flow.run(_rows(ctx, asked, jobs, sampling, stream=flow.write))
    else:
        print_rows(_rows(ctx, asked, jobs, sampling))


def _into_file(
    ctx: typer.Context, asked: dict[str, float], jobs: Iterator[Job], sampling: Sampling, total: int | None, fmt: Any
) -> None:
    from braces_cli.steering.resumable_output import TextsFile

    p = ctx.params
    settings = {name: value for name, value in o.resolved(ctx).items() if name in _TEXT_DEPENDS_ON}
    file = TextsFile(p["output"], settings, resume=p["resume"], overwrite=p["overwrite"])
    file.skip(jobs, asked, sampling.seed)
    start, written = time.monotonic(), 0
    first = next(jobs, None)
    if first is not None:
        written = file.write(_rows(ctx, asked, chain([first], jobs), sampling, total=total, done=file.rows))
    result = {
        "output": str(file.path),
        "texts": file.rows + written,
        "resumed_from": file.rows if p["resume"] else None,
        "seconds": time.monotonic() - start,
    }
    if fmt is o.Format.json:
        print_json(result)
    else:
        print_pairs("texts written", result)


def _rows(
    ctx: typer.Context,
    asked: dict[str, float],
    jobs: Iterator[Job],
    sampling: Sampling,
    *,
    stream: Any = None,
    done: int = 0,
    total: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of texts; the model is loaded when the first is asked for."""
    from braces_cli.core.attributes.attribute import find_attribute
    from braces_cli.core.attributes.intervention import steered
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.steering.chat_prompts import chat_wanted
    from braces_cli.steering.generate_texts import steer_jobs

    p, quiet = ctx.params, ctx.params["quiet"]
    session = open_base(ctx)
    with progress(quiet) as report:
        terms = [(find_attribute(session, name, p["attributes"], report), value) for name, value in asked.items()]
    layers = chosen_layers(session.base.model, p["layers"])
    chat = chat_wanted(session, p["apply_chat_template"])
    with steered(session, terms, layers) as pushes:
        note(asked, pushes)
    # Where texts appear on the terminal they are the progress.
    hidden = quiet or (p["output"] is None and sys.stdout.isatty())
    beside = (lambda: steered(session, terms, layers)) if p["beside"] else None
    with progress(hidden) as report, nullcontext() if beside else steered(session, terms, layers):
        yield from steer_jobs(
            session, jobs, asked, sampling, batch_size=p["batch_size"], chat=chat, beside=beside, stream=stream,
            done=done, total=total, report=report,
        )  # fmt: skip


def open_base(ctx: typer.Context) -> Session:
    """The base, and the adapter on it, that the options name."""
    from braces_cli.core.session import open_session

    return open_session(ctx.params["model"], ctx.params["adapter"], o.load_options(ctx))


def note(asked: dict[str, float], pushes: list[Push]) -> None:
    """One line on stderr, so that nobody wonders why nothing happens."""
    if not asked:
        return
    what = ", ".join(f"{name} {value:+g}" for name, value in asked.items())
    strongest = max(pushes, key=lambda push: push.share, default=None)
    if strongest is None:
        found = "nothing is added, the text is that of the unsteered model"
    else:
        found = f"the added vector is {strongest.share:.1%} of the residual stream at most (layer {strongest.layer})"
    logging.getLogger("braces").info("%s: %s", what, found)
