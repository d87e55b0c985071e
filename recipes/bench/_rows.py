"""Rows of the lengths of real sets, in batches as training draws them: how much padding, and how fast each way is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from _bench import twin

# Mean, spread, least and most tokens of a training row with the SmolLM2 tokenizer: 23.3 and 10.8 in SST-5's 8,541
# rows, 47.2 and 1.9 in BoolQ's 9,427.
SETS = {"sst5": (23.3, 10.8, 3, 65), "boolq": (47.2, 1.9, 45, 62)}
BATCH = 16
BATCHES = 64
# What rows of SST-5 are labelled: two of five classes each side of neutral.
STRENGTHS = (1.0, 1.0, -1.0, -1.0, 0.0)


def batches(name: str, vocabulary: int) -> list[list[Any]]:
    """Random examples in the order that training gives them, `BATCH` at a time."""
    import torch

    from braces_cli.core.models.tokenize import Encoded
    from braces_cli.data.dataset import Example
    from braces_cli.training.batching import EpochSampler

    mean, spread, least, most = SETS[name]
    generator = torch.Generator().manual_seed(0)
    count = BATCH * BATCHES
    lengths = (torch.randn(count, generator=generator) * spread + mean).round().clamp(least, most).int().tolist()
    rows = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        rows.append(Example(Encoded(ids, ids, False, False), None))
    order = list(EpochSampler(count, 0, BATCH))
    return [[rows[index] for index in order[start : start + BATCH]] for start in range(0, count, BATCH)]


def collators(model: Any) -> dict[str, Callable[[list[Any]], list[dict[str, Any]]]]:
    """What turns a batch into blocks: `padded` to the longest row of each batch, `packed` and `grouped` as we do."""
    from braces_cli.core.models.tokenize import pad_right
    from braces_cli.training.batching import Collator, Layout, attention_cost

    config = model.config
    packed = Collator(Layout(True, attention_cost(model, config.num_hidden_layers, config.hidden_size)), 0)
    grouped = Collator(Layout(False), 0)
    return {
        "padded": lambda rows: [pad_right([row.tokens for row in rows], 0)],
        "packed": lambda rows: packed(rows).blocks,
        "grouped": lambda rows: grouped(rows).blocks,
    }


def padding(model: Any, how: str, name: str) -> tuple[list[int], list[int]]:
    """Padding and all computed tokens of each batch."""
    from braces_cli.training.batching import computed_tokens

    collate = collators(model)[how]
    wasted, computed = [], []
    for rows in batches(name, 256):
        total = computed_tokens(collate(rows))
        computed.append(total)
        wasted.append(total - sum(len(row.tokens.ids) for row in rows))
    return wasted, computed


def steppers(args: argparse.Namespace, model: Any, parameters: list[Any]) -> dict[str, Callable[[], None]]:
    """Training steps over the rows of SST-5's lengths, one way each; all see the same batches in the same order."""
    import torch

    from braces_cli.training.loss import mean_loss

    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()
    rows = batches("sst5", 256)[: 4 if args.quick else BATCHES]

    def make(collate: Callable[[list[Any]], list[dict[str, Any]]]) -> Callable[[], None]:
        ready = [[{k: v.to(args.device) for k, v in block.items()} for block in collate(part)] for part in rows]
        turn = _cycle(ready)

        def step() -> None:
            blocks = next(turn)
            count = sum((block["labels"][:, 1:] != -100).sum() for block in blocks)
            for block in blocks:
                inputs = {name: tensor for name, tensor in block.items() if name != "labels"}
                mean_loss(model(**inputs, use_cache=False).logits, block["labels"], count).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    found = collators(model)
    return {name: make(found[name]) for name in ("padded", "packed")}


def attribute_steppers(args: argparse.Namespace, base: Any) -> dict[str, Callable[[], None]]:
    """Training steps as `braces train` takes them, with an attribute in each row and without; same rows and weights.

    With it, four rows of five also pass at the opposite strength.
    """
    from dataclasses import replace

    import torch

    from braces_cli.core.adapter.model import attach
    from braces_cli.data.dataset import Condition
    from braces_cli.training.batching import Collator, Layout, attention_cost
    from braces_cli.training.conditioning import Conditioner
    from braces_cli.training.loss import PAIR_TERMS, contrastive_loss, mean_loss, only_scored, token_nll
    from braces_cli.training.settings import DEFAULT_CONTRAST, DEFAULT_MARGIN, DEFAULT_RANK

    config = base.config
    cost = attention_cost(base, config.num_hidden_layers, config.hidden_size)
    parts = batches("sst5", 256)[: 4 if args.quick else BATCHES]

    def make(attribute: bool) -> Callable[[], None]:
        model = twin(base).train()
        adapter = attach(model, DEFAULT_RANK)
        parameters, conditioner = [p for _, p in adapter.named_parameters()], None
        if attribute:
            parameters += adapter.add_mlp().parameters()
            conditioner = Conditioner(adapter, [random_attribute(adapter)])
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        collate = Collator(Layout(True, cost, only_scored=True, contrast=attribute), 0, conditioner)
        turn = _cycle(parts)

        def step() -> None:
            rows = [
                replace(row, condition=Condition("random", STRENGTHS[place % len(STRENGTHS)], ""))
                for place, row in enumerate(next(turn))
            ]
            batch = collate(rows)
            (block,) = ({name: tensor.to(args.device) for name, tensor in each.items()} for each in batch.blocks)
            if conditioner is not None:
                conditioner.apply(block.pop("strengths"))
            labels, owner = block.pop("labels"), block.pop("owner", None)
            terms = {name: block.pop(name) for name in PAIR_TERMS if name in block}
            with only_scored(model, block.pop("scored", None)):
                logits = model(**block, use_cache=False).logits
            if owner is None:
                loss = mean_loss(logits, labels, batch.scored)
            else:
                nll = token_nll(logits, labels)
                loss = contrastive_loss(nll, owner, terms, DEFAULT_CONTRAST, DEFAULT_MARGIN, batch.scored)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {"attribute": make(True), "plain": make(False)}


def random_attribute(adapter: Any) -> Any:
    """An attribute of random states for the model that `adapter` is on."""
    import torch

    from braces_cli.core.attributes.vector import Attribute

    generator = torch.Generator().manual_seed(0)
    layers, width = len(adapter.layers), adapter.adapted_ffns[0][0].hidden_size
    hidden = torch.randn(layers, width, generator=generator)
    ones = torch.ones(layers)
    return Attribute("random", [], hidden, torch.zeros_like(hidden), ones, ones, adapter.layers, {})


def _cycle(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items
