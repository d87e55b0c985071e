"""Packed rows against the same examples one at a time: values, gradients, attributes; and when rows are not packed."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from braces_cli.core.adapter.model import attach
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.tokenize import IGNORED, Encoded
from braces_cli.data.dataset import Condition, Example
from braces_cli.training.batching import (
    MOST_PADDING,
    NONE,
    Collator,
    EpochSampler,
    Layout,
    choose_layout,
    computed_tokens,
    fill_rows,
    packing_fault,
    similar_lengths,
)
from braces_cli.training.conditioning import Conditioner
from braces_cli.training.loss import can_pick, mean_loss, only_scored
from braces_cli.training.settings import TrainSettings
from tests.conftest import open_gates, tiny_model
from tests.core.method.test_reference import relative

LENGTHS = (9, 2, 14, 5, 14, 3, 7)
MOODS = [("good", 1.5), (None, 0.0), ("old", -2.0), ("good", 1.0), ("old", 0.5), (None, 0.0), ("good", -1.0)]
LAYOUTS = {
    "one row": Layout(packed=True),
    "several rows": Layout(packed=True, attention=0.1),
    "grouped": Layout(packed=False, groups=3),
    "several rows, only scored": Layout(packed=True, attention=0.1, only_scored=True),
    "grouped, only scored": Layout(packed=False, groups=3, only_scored=True),
}


def examples(conditioned=False):
    """Rows of odd lengths, some with a prompt that is not scored."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length, (name, s) in zip(LENGTHS, MOODS, strict=True):
        ids = torch.randint(3, 90, (length,), generator=draw).tolist()
        labels = [IGNORED] * (length // 3) + ids[length // 3 :]
        rows.append(Example(Encoded(ids, labels, True, False), Condition(name, s, "") if conditioned else None))
    return rows


def gradients(model, adapter, run):
    """Loss and gradients of everything that trains."""
    model.zero_grad()
    loss = run()
    loss.backward()
    trained = [p for _, p in adapter.named_parameters()] + ([*adapter.mlp.parameters()] if adapter.mlp else [])
    return loss.detach(), torch.cat([p.grad.flatten() for p in trained])


def alone(model, rows, conditioner):
    """Every example by itself, no packing, no padding, no mask: the sum over scored tokens by their number."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.tokens.ids]), torch.tensor(row.tokens.labels)
        if conditioner is not None:
            conditioner.apply(conditioner.strengths([row.condition]))
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
        count += row.tokens.scored
    return total / count


def in_blocks(model, rows, conditioner, layout):
    batch = Collator(layout, 1, conditioner)(rows)
    total = 0.0
    for block in batch.blocks:
        if conditioner is not None:
            conditioner.apply(block.pop("strengths"))
        labels = block.pop("labels")
        with only_scored(model, block.pop("scored", None)):
            total = total + mean_loss(model(**block, use_cache=False).logits, labels, batch.scored)
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "attributes"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_loss_and_gradients_are_those_of_each_example_alone(session, layout, conditioned, dtype, tolerance):
    """Each token with its own example's attributes; no example sees another, nor is its first token scored."""
    model = session.base.model
    attributes = [build_attribute(session, name, [name]) for name in ("good", "old")] if conditioned else []
    model.to(dtype)
    adapter = attach(model, 4)
    open_gates(adapter)
    conditioner = None
    if conditioned:
        adapter.add_mlp(seed=3)
        with torch.no_grad():
            adapter.mlp.down.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
        conditioner = Conditioner(adapter, attributes)
    rows = examples(conditioned)
    expected, wanted_gradients = gradients(model, adapter, lambda: alone(model, rows, conditioner))
    loss, found = gradients(model, adapter, lambda: in_blocks(model, rows, conditioner, LAYOUTS[layout]))
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    assert relative(found, wanted_gradients) < tolerance
    if conditioned and dtype == torch.float32:  # not by chance: other attributes give other losses
        conditioner.apply(conditioner.strengths([Condition("old", 1.0, "")]))
        assert float(in_blocks(model, examples(), None, LAYOUTS[layout])) != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "overrides", "packs"),
    [
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("mistral", {"sliding_window": 4}, True),
        ("gpt2", {}, True),
        ("gpt_neox", {}, True),
        ("gemma", {}, True),
        ("phi", {}, True),
        ("opt", {}, False),  # it makes a mask of its own, in which nothing starts anew
    ],
)
def test_the_probe_tells_what_can_be_packed(name, overrides, packs):
    """By logits, of the very model, and not by its name."""
    probe = [row.tokens.ids for row in examples()[:3]]
    fault = packing_fault(tiny_model(name, **overrides), probe, 1)
    assert (fault is None) == packs, fault


class Leaky(torch.nn.Module):
    """Attention that looks across examples, by an amount that rounding would hide."""

    def __init__(self, model, share, always=False):
        super().__init__()
        self.inner, self.share, self.always = model, share, always
        self.config = model.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, **inputs):
        out = self.inner(**inputs)
        out.logits = out.logits + self.share * out.logits[:, :1] * (
            self.always or inputs.get("position_ids") is not None
        )
        return out


def test_the_probe_sees_a_leak_below_the_tolerance_of_its_dtype():
    """What one example is moves the next by less than bfloat16 rounds, and is seen all the same."""
    probe = [row.tokens.ids for row in examples()[:3]]
    model = tiny_model(dtype=torch.bfloat16)
    assert packing_fault(Leaky(model, 0.0), probe, 1) is None
    assert "moves the logits of the next one" in packing_fault(Leaky(model, 0.025), probe, 1)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "gpt_neox", "opt", "phi"])
def test_logits_are_those_of_scored_tokens_only(name):
    """As many as there are scored tokens, and all again behind the block; where a head is no head, all of them."""
    model = tiny_model(name)
    block = Collator(Layout(packed=False, groups=1, only_scored=True), 1)(examples()).blocks[0]
    ids, scored = block["input_ids"], block["scored"]
    assert len(scored) == sum(row.tokens.scored for row in examples()) < ids.numel()
    assert can_pick(model, ids[0, :5].tolist(), 1e-4)
    with only_scored(model, scored):
        assert model(ids, use_cache=False).logits.shape == (1, len(scored), model.config.vocab_size)
    assert model(ids, use_cache=False).logits.shape[:2] == ids.shape
    assert not can_pick(Leaky(model, 0.1), [3, 4, 5], 1e-4)  # it names no head
    mixing = Leaky(model, 0.1, always=True)
    mixing.get_output_embeddings = model.get_output_embeddings
    assert not can_pick(mixing, [3, 4, 5], 1e-4)


def test_packing_is_refused_or_left_alone_where_the_probe_says_no(session, monkeypatch):
    """`on` exits 2 with the reason; `auto` groups by length; `off` does so without a probe."""
    items = [row.tokens for row in examples()]
    assert choose_layout(session, TrainSettings(), items).packed
    assert not choose_layout(session, TrainSettings(packing="off"), items).packed
    session.base.model = tiny_model("opt")
    assert choose_layout(session, TrainSettings(), items) == Layout(packed=False, only_scored=True)
    with pytest.raises(ConfigError, match="cannot be packed: packed logits differ"):
        choose_layout(session, TrainSettings(packing="on"), items)
    # A checkpointed group would be computed again with the attributes of the last one.
    kept = TrainSettings(packing="off", gradient_checkpointing=True, attribute_field="mood")
    assert choose_layout(session, kept, items).groups == 1


@pytest.mark.parametrize("attention", [0.0, 1e-3, 1.0])
def test_rows_hold_every_example_once_and_little_padding(attention):
    """One row where attention is free; more where a long row is dear; never more than 5 % padding."""
    lengths = [random.Random(attention).randint(3, 60) for _ in range(16)]
    rows = fill_rows(lengths, attention)
    assert sorted(index for row in rows for index in row) == list(range(16))
    width = max(sum(lengths[index] for index in row) for row in rows)
    assert sum(lengths) >= (1 - MOST_PADDING) * width * len(rows)
    assert (len(rows) == 1) == (attention == 0.0)


def test_rows_are_no_longer_than_the_context():
    """Some models keep masks of that size; an example is never longer."""
    rows = fill_rows([9, 5, 4, 3, 3, 2], attention=0.0, context=10)
    assert max(sum([9, 5, 4, 3, 3, 2][index] for index in row) for row in rows) <= 10
    assert len(rows) == 3


def test_groups_pad_as_little_as_any():
    """Against every way to cut the sorted lengths in three."""
    lengths = list(LENGTHS)
    groups = similar_lengths(lengths, 3)
    assert sorted(index for group in groups for index in group) == list(range(7))
    padded = sum(len(group) * max(lengths[index] for index in group) for group in groups)
    ranked = sorted(lengths)
    cuts = [(a, b) for a in range(1, 7) for b in range(a + 1, 7)]
    assert padded == min(a * ranked[a - 1] + (b - a) * ranked[b - 1] + (7 - b) * ranked[-1] for a, b in cuts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_nothing_still_has_its_blocks(layout):
    """A process without an example in the last batch takes part in every pass, and scores nothing."""
    full = Collator(LAYOUTS[layout], 1)([*examples(), None])
    empty = Collator(LAYOUTS[layout], 1)([None] * 8)
    assert len(empty.blocks) == len(full.blocks)
    assert all((block["labels"] == IGNORED).all() for block in empty.blocks)
    assert (empty.tokens, empty.scored) == (0, 0)
    assert full.tokens == sum(LENGTHS)
    assert 0 < full.scored < full.tokens
    assert full.computed == computed_tokens(full.blocks) >= sum(LENGTHS)


def test_the_order_is_a_function_of_seed_and_global_batch():
    """Every example once an epoch, another order each epoch, and the last global batch filled with nothing."""
    order = EpochSampler(21, seed=0, global_batch=8)
    first = list(order)
    assert len(first) == len(order) == 24
    assert sorted(first[:21]) == list(range(21))
    assert first[21:] == [NONE] * 3
    order.set_epoch(1)
    assert sorted(order) == sorted(first)
    assert list(order) != first
    assert list(EpochSampler(21, seed=0, global_batch=8)) == first
    assert list(EpochSampler(21, seed=1, global_batch=8)) != first
