"""Prompts -> steered texts, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from braces_cli.core.generate import Job, Sampling, generate
from braces_cli.core.progress import Report, silent
from braces_cli.core.session import Session


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
    """Rows `{prompt, text, attributes, sample, seed}` in order, as each batch is done; call inside `core.push.steered`.

    Only one batch of prompts is held at a time.
    """
    jobs = (Job(prompt, index, k) for index, prompt in enumerate(prompts) for k in range(samples))
    done = 0
    while batch := list(islice(jobs, batch_size)):
        texts = generate(session.base.model, session.base.tokenizer, batch, sampling)
        done += len(batch)
        report("generating", done, None)
        for job, text in zip(batch, texts, strict=True):
            yield {
                "prompt": job.prompt,
                "text": text,
                "attributes": attributes,
                "sample": job.sample,
                "seed": sampling.seed,
            }
