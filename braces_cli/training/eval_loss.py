"""How well a model, with or without its adapter, tells the evaluation rows; shared out where there are processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from braces_cli.core.utils.distributed import gathered, rank, world_size
from braces_cli.core.utils.progress import Report
from braces_cli.data.examples import Examples
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from braces_cli.training.attribute_conditioning import Conditioner


def measure(
    model: Any,
    examples: Examples | None,
    conditioner: Conditioner | None,
    pad_id: int,
    batch_size: int,
    report: Report,
    stage: str,
) -> Likelihood | None:
    """Likelihood of all examples together, each on its own condition, every token counting the same."""
    if examples is None:
        return None
    mine, count = _share([len(item.ids) for item in examples.items])
    rows = examples.conditions

    def condition(batch: Sequence[int]) -> None:
        if conditioner is not None:
            with torch.no_grad():
                conditioner.apply(conditioner.strengths([rows[mine[row]] for row in batch]))

    try:
        items = [examples.items[row] for row in mine]
        found = likelihoods(model, items, pad_id, batch_size, report, stage, condition)
    finally:
        if conditioner is not None:
            conditioner.clear()
    return sum(gathered(sum(found[:count], Likelihood())), Likelihood())


def _share(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Rows of this process, and how many of them count.

    Every process gets as many, the last of which may be a repetition: where a model is spread over processes, all must
    call it equally often.
    """
    if world_size() == 1:
        return list(range(len(lengths))), len(lengths)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    mine = order[rank() :: world_size()]
    share = -(-len(lengths) // world_size())
    return mine + order[: share - len(mine)], len(mine)
