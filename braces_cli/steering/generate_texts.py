"""Prompts -> steered texts, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

from braces_cli.core.models.generation import Job, Sampling, generate
from braces_cli.core.session import Session
from braces_cli.core.utils.progress import Report, silent
from braces_cli.steering.chat_prompts import chat_ids

# Steers the open model while it is entered.
Steering = Callable[[], AbstractContextManager[Any]]


def jobs_of(prompts: Iterable[str], samples: int = 1) -> Iterator[Job]:
    """The texts that a run generates, in order: the samples of a prompt stand together."""
    return (Job(prompt, index, k) for index, prompt in enumerate(prompts) for k in range(samples))


def steer_texts(
    session: Session,
    prompts: Iterable[str],
    attributes: dict[str, float],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = 8,
    report: Report = silent,
) -> Iterator[dict[str, Any]]:
    """Rows `{prompt, text, attributes, sample, seed}` in order, as each batch is done.

    Call inside `core.attributes.intervention.steered`.

    Only one batch of prompts is held at a time.
    """
    return steer_jobs(session, jobs_of(prompts, samples), attributes, sampling, batch_size=batch_size, report=report)


def steer_jobs(
    session: Session,
    jobs: Iterable[Job],
    attributes: dict[str, float],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    chat: bool = False,
    beside: Steering | None = None,
    stream: Callable[[Job, str], object] | None = None,
    done: int = 0,
    total: int | None = None,
    report: Report = silent,
) -> Iterator[dict[str, Any]]:
    """The same for jobs.

    Args:
        chat: prompts go through the chat template.
        beside: rows also get the `unsteered` text of the same random stream; steers, in place of the caller.
        stream: called with each piece of a text; for batches of one.
        done: texts that an earlier run has generated, of `total` in all; for `report` only.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    jobs = iter(jobs)
    while batch := list(islice(jobs, batch_size)):
        if chat:
            batch = [replace(job, ids=chat_ids(tokenizer, job.prompt)) for job in batch]
        first = batch[0]
        plain = [] if beside is None else generate(model, tokenizer, batch, sampling)
        with nullcontext() if beside is None else beside():
            write = None if stream is None else lambda piece, job=first: stream(job, piece)
            texts = generate(model, tokenizer, batch, sampling, write)
        done += len(batch)
        report("generating", done, total)
        for place, (job, text) in enumerate(zip(batch, texts, strict=True)):
            row = {"prompt": job.prompt, "text": text, "attributes": attributes, "sample": job.sample}
            yield row | {"seed": sampling.seed} | ({} if beside is None else {"unsteered": plain[place]})
