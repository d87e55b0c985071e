"""The contrastive loss."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from braces_cli.core.adapter.model import attach, open_session
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import only_scored
from braces_cli.core.models.tokenize import IGNORED
from braces_cli.core.options import LoadOptions
from braces_cli.data.dataset import Condition
from braces_cli.scoring.likelihood import continuation_likelihoods
from braces_cli.training.batching import Layout, collate, similar_lengths
from braces_cli.training.conditioning import Conditioner
from braces_cli.training.loss import PAIR_TERMS, contrastive_loss, token_nll
from braces_cli.training.report import read_metrics
from tests.conftest import open_gates, write_rows
from tests.core.comparison import relative
from tests.training.test_batching import LAYOUTS, LENGTHS, examples, gradients

STRENGTHS = (("positive", 3.0), (None, 0.0), ("negative", 1.5), (None, 0.0), ("positive", -1.0), ("negative", 0.5))
WEIGHT, MARGIN = 0.5, 2.0


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def trained(session, request, device):
    """An adapter with attributes, its conditioner, and the tolerance of the dtype."""
    session.base.model.to(request.param).to(device)
    adapter = attach(session.base.model, 4)
    open_gates(adapter)
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.scale = 1.0  # the rounding of bfloat16 grows with the side path
    with torch.no_grad():
        adapter.add_mlp(seed=3).down.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    words = {"negative": "sad", "positive": "good"}
    conditioner = Conditioner(adapter, [build_attribute(session, name, [word]) for name, word in words.items()])
    return adapter, conditioner, 2e-5 if request.param == torch.float32 else 3e-2


def slow_nll(adapter, conditioner, row, sign):
    """-log p of a row alone at its strength or the opposite one, without packing, padding or selected logits."""
    strength = Condition(row.condition.attribute, sign * row.condition.strength, "")
    conditioner.apply(conditioner.strengths([strength]))
    device = input_device(adapter.model)
    ids, labels = torch.tensor([row.tokens.ids], device=device), torch.tensor(row.tokens.labels, device=device)
    logits = adapter.model(ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")


def slow_loss(adapter, conditioner, groups, weight, count):
    """The formula row by row: the mean of the pairs of each group, weighted by its scored tokens."""
    rows, total = examples(STRENGTHS), 0.0
    for group in groups:
        own = {index: slow_nll(adapter, conditioner, rows[index], 1) for index in group}
        total = total + sum(own.values())
        pairs = []
        for index in group:
            strength = rows[index].condition.strength
            if strength:
                gap = own[index] - slow_nll(adapter, conditioner, rows[index], -1)
                pairs.append(F.softplus(MARGIN * abs(strength) + gap))
        if pairs:
            share = sum(rows[index].tokens.scored for index in group) / len(pairs)
            total = total + weight * share * sum(pairs)
    return total / count


def fast_loss(adapter, conditioner, layout, rows, weight, count):
    total = 0.0
    for block in collate(rows, layout, 1, conditioner).blocks:
        block = {name: tensor.to(input_device(adapter.model)) for name, tensor in block.items()}
        conditioner.apply(block.pop("strengths"))
        labels, owner = block.pop("labels"), block.pop("owner")
        terms = {name: block.pop(name) for name in PAIR_TERMS}
        with only_scored(adapter.model, block.pop("scored", None)):
            logits = adapter.model(**block, use_cache=False).logits
        total = total + sum(contrastive_loss(token_nll(logits, labels), owner, terms, weight, MARGIN)) / count
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_formula(trained, layout):
    """In every layout; weight 0 is the plain loss, and twice the count half of it."""
    adapter, conditioner, tolerance = trained
    arranged = replace(LAYOUTS[layout], contrast=True)
    rows = examples(STRENGTHS)
    by_length = similar_lengths([len(row.tokens.ids) for row in rows], arranged.groups)
    scored = sum(row.tokens.scored for row in rows)
    for weight, count in ((WEIGHT, scored), (0.0, 2 * scored)):
        expected = slow_loss(adapter, conditioner, by_length, weight, count)
        loss = fast_loss(adapter, conditioner, arranged, [*rows, None], weight, count)
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        assert relative(gradients(adapter, loss), gradients(adapter, expected)) < tolerance


def test_rows_without_an_attribute_have_no_opposite(trained):
    """They pass once, with the plain loss; a batch without rows has loss 0."""
    adapter, conditioner, tolerance = trained
    rows = examples([(None, 0.0)] * 3)
    scored = sum(row.tokens.scored for row in rows)
    for packed in (False, True):
        layout = Layout(packed, groups=2, only_scored=True, contrast=True)
        assert collate(rows, layout, 1, conditioner).blocks[0]["input_ids"].numel() <= sum(LENGTHS[:3])
        loss = fast_loss(adapter, conditioner, layout, rows, WEIGHT, scored)
        expected = sum(slow_nll(adapter, conditioner, row, 1) for row in rows) / scored
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        assert fast_loss(adapter, conditioner, layout, [None, None], WEIGHT, 1).item() == 0


def test_counts_exclude_opposite_strengths(trained):
    _, conditioner, _ = trained
    plain, contrasted = (
        collate(examples(STRENGTHS), Layout(True, contrast=contrast), 1, conditioner) for contrast in (False, True)
    )
    assert (contrasted.tokens, contrasted.scored) == (plain.tokens, plain.scored)
    assert contrasted.computed == contrasted.tokens  # one row has no padding


def test_contrastive_loss_makes_steering_stronger(train, tmp_path):
    """The likelihood of rows of two kinds depends more on the strength than without the loss."""
    kinds = {"positive": "good day good film", "negative": "sad town sad end"}
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text, "mood": name} for name, text in kinds.items()] * 8)
    options = ("--max-steps", 15, "--batch-size", 8, "--warmup-steps", 0, "--lr", 0.03, "--gate-lr", 0.3)
    options += ("--attribute-field", "mood", "--opposites", "positive:negative", "--logging-steps", 1)
    gains, logged = [], []
    for contrast in (("--contrast", 0), ("--contrast", 1, "--margin", 20)):
        folder = tmp_path / f"w{contrast[1]}"
        outcome = train(folder, *options, *contrast, data=rows)
        assert outcome.code == 0, outcome.err
        logged.append(read_metrics(folder / "metrics.jsonl")[0])
        session = open_session(None, str(folder), LoadOptions(device="cpu"))
        positive = find_attribute(session, "positive", None)
        gain = 0.0
        for sign, text in zip((1, -1), kinds.values(), strict=True):
            for s in (sign, -sign):
                with steered(session, [(positive, float(s))]):
                    found = continuation_likelihoods(session.base, [("", text)], 1)
                gain += -found[0].nll if s == sign else found[0].nll
        gains.append(gain)
    assert gains[1] > gains[0] + 0.5
    # The part of the language model in the loss of a step.
    assert "lm_loss" not in logged[0]
    assert logged[1]["lm_loss"] == pytest.approx(logged[0]["loss"], rel=1e-5)
    assert logged[1]["loss"] > logged[1]["lm_loss"] + 1
