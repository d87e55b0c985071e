"""Packed rows compared with each example alone, the packing probe, and the order of examples."""

import random

import pytest
import torch
import torch.nn.functional as F

from braces_cli.core.adapter.model import attach
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.structure import only_scored
from braces_cli.core.models.tokenize import IGNORED, Encoded
from braces_cli.data.dataset import Condition, Example
from braces_cli.training import batching
from braces_cli.training.loss import can_pick, token_nll
from braces_cli.training.settings import TrainSettings
from tests.conftest import open_gates, tiny_model
from tests.core.comparison import relative

LENGTHS = (9, 2, 14, 5, 14, 3, 7)
LAYOUTS = {
    "one row": batching.Layout(packed=True),
    "several rows": batching.Layout(packed=True, attention=0.1),
    "grouped": batching.Layout(packed=False, groups=3),
    "several rows, only scored": batching.Layout(packed=True, attention=0.1, only_scored=True),
    "grouped, only scored": batching.Layout(packed=False, groups=3, only_scored=True),
}


def examples(moods=()):
    """Rows of odd lengths, some with a prompt that is not scored; with `moods`, as many and with attributes."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length, mood in zip(LENGTHS, moods or [None] * len(LENGTHS), strict=False):
        ids = torch.randint(3, 90, (length,), generator=draw).tolist()
        labels = [IGNORED] * (length // 3) + ids[length // 3 :]
        rows.append(Example(Encoded(ids, labels), mood and Condition(*mood, "")))
    return rows


def gradients(adapter, loss):
    """Gradients of all trained parameters as one vector."""
    adapter.model.zero_grad()
    loss.backward()
    trained = [p for _, p in adapter.named_parameters()] + ([*adapter.mlp.parameters()] if adapter.mlp else [])
    return torch.cat([p.grad.flatten() for p in trained])


def alone(model, rows):
    """Loss of each example alone, without packing, padding or mask: sum over scored tokens / their number."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.tokens.ids]), torch.tensor(row.tokens.labels)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
        count += row.tokens.scored
    return total / count


def in_blocks(model, rows, layout):
    batch = batching.collate(rows, layout, 1)
    total = 0.0
    for block in batch.blocks:
        labels = block.pop("labels")
        with only_scored(model, block.pop("scored", None)):
            total = total + token_nll(model(**block, use_cache=False).logits, labels).sum() / batch.scored
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_blocks_give_loss_and_gradients_of_each_example_alone(layout, dtype, tolerance):
    """Examples are independent, first tokens are not scored; with attributes, see test_loss.py."""
    model = tiny_model(dtype=dtype)
    adapter = attach(model, 4)
    open_gates(adapter)
    expected = alone(model, examples())
    expected_gradients = gradients(adapter, expected)
    loss = in_blocks(model, examples(), LAYOUTS[layout])
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert relative(gradients(adapter, loss), expected_gradients) < tolerance


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
        ("opt", {}, False),  # it ignores positions in its attention mask
    ],
)
def test_packing_probe(name, overrides, packs):
    """By logits of the model, not by its name."""
    probe = [row.tokens.ids for row in examples()[:3]]
    fault = batching.packing_fault(tiny_model(name, **overrides), probe, 1)
    assert (fault is None) == packs, fault


class Leaky(torch.nn.Module):
    """Attention across examples, below the tolerance of rounding."""

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


def test_packing_probe_finds_a_leak_below_the_rounding_of_bfloat16():
    probe = [row.tokens.ids for row in examples()[:3]]
    model = tiny_model(dtype=torch.bfloat16)
    assert batching.packing_fault(Leaky(model, 0.0), probe, 1) is None
    assert "moves the logits of the next one" in batching.packing_fault(Leaky(model, 0.025), probe, 1)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "gpt_neox", "opt", "phi"])
def test_logits_of_scored_tokens_only(name):
    """All logits again outside the block, and for a model without a standard head."""
    model = tiny_model(name)
    block = batching.collate(examples(), batching.Layout(packed=False, groups=1, only_scored=True), 1).blocks[0]
    ids, scored = block["input_ids"], block["scored"]
    assert len(scored) == sum(row.tokens.scored for row in examples()) < ids.numel()
    assert can_pick(model, ids[0, :5].tolist(), 1e-4)
    with only_scored(model, scored):
        assert model(ids, use_cache=False).logits.shape == (1, len(scored), model.config.vocab_size)
    assert model(ids, use_cache=False).logits.shape[:2] == ids.shape
    assert not can_pick(Leaky(model, 0.1), [3, 4, 5], 1e-4)  # it has no output embeddings
    mixing = Leaky(model, 0.1, always=True)
    mixing.get_output_embeddings = model.get_output_embeddings
    assert not can_pick(mixing, [3, 4, 5], 1e-4)


def test_layout_of_a_model_that_fails_the_probe(session, monkeypatch):
    """`on` raises; `auto` groups by length; `off` does not run the probe."""
    items = [row.tokens for row in examples()]
    assert batching.choose_layout(session, TrainSettings(), items).packed
    assert not batching.choose_layout(session, TrainSettings(packing="off"), items).packed
    session.base.model = tiny_model("opt")
    assert batching.choose_layout(session, TrainSettings(), items) == batching.Layout(packed=False, only_scored=True)
    with pytest.raises(ConfigError, match="cannot be packed: packed logits differ"):
        batching.choose_layout(session, TrainSettings(packing="on"), items)
    # With gradient checkpointing, a group would be recomputed with the attributes of the last group.
    kept = TrainSettings(packing="off", gradient_checkpointing=True, attribute_field="mood")
    assert batching.choose_layout(session, kept, items).groups == 1


@pytest.mark.parametrize("attention", [0.0, 1e-3, 1.0])
def test_packed_rows(attention):
    """Every example once; one row if attention is free; at most 5 % padding."""
    lengths = [random.Random(attention).randint(3, 60) for _ in range(16)]
    rows = batching.fill_rows(lengths, attention)
    assert sorted(index for row in rows for index in row) == list(range(16))
    width = max(sum(lengths[index] for index in row) for row in rows)
    assert sum(lengths) >= (1 - batching.MOST_PADDING) * width * len(rows)
    assert (len(rows) == 1) == (attention == 0.0)


def test_packed_rows_fit_the_context():
    lengths = [9, 5, 4, 3, 3, 2]
    assert sorted(sum(lengths[index] for index in row) for row in batching.fill_rows(lengths, context=10)) == [8, 9, 9]


def test_groups_have_minimal_padding():
    """Compared with every way to cut the sorted lengths in three."""
    lengths = list(LENGTHS)
    groups = batching.similar_lengths(lengths, 3)
    assert sorted(index for group in groups for index in group) == list(range(7))
    padded = sum(len(group) * max(lengths[index] for index in group) for group in groups)
    ranked = sorted(lengths)
    cuts = [(a, b) for a in range(1, 7) for b in range(a + 1, 7)]
    assert padded == min(a * ranked[a - 1] + (b - a) * ranked[b - 1] + (7 - b) * ranked[-1] for a, b in cuts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_without_examples(layout):
    """A process without an example in the last batch has the same number of blocks, without scored tokens."""
    full = batching.collate([*examples(), None], LAYOUTS[layout], 1)
    empty = batching.collate([None] * 8, LAYOUTS[layout], 1)
    assert len(empty.blocks) == len(full.blocks)
    assert all((block["labels"] == IGNORED).all() for block in empty.blocks)
    assert (empty.tokens, empty.scored) == (0, 0)
    assert full.tokens == sum(LENGTHS)
    assert 0 < full.scored < full.tokens
    assert full.computed == sum(block["input_ids"].numel() for block in full.blocks) >= sum(LENGTHS)


def test_order_of_examples():
    """Every example once an epoch, another order each epoch; None fills the last global batch."""
    first = batching.epoch_order(21, seed=0, epoch=0, size=8)
    assert sorted(first[:21]) == list(range(21))
    assert first[21:] == [None] * 3
    second = batching.epoch_order(21, seed=0, epoch=1, size=8)
    assert set(second) == set(first)
    assert second != first
    assert batching.epoch_order(21, seed=0, epoch=0, size=8) == first
    assert batching.epoch_order(21, seed=1, epoch=0, size=8) != first
