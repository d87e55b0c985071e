"""The contrastive loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from braces_cli.core.adapter.model import attach
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.models.load import input_device
from braces_cli.core.models.tokenize import IGNORED, Encoded
from braces_cli.data.dataset import Condition, Example
from braces_cli.training.batching import Layout, collate, similar_lengths
from braces_cli.training.conditioning import Conditioner
from braces_cli.training.loss import PAIR_TERMS, contrastive_loss, only_scored, token_nll
from tests.conftest import open_gates
from tests.core.comparison import relative

LENGTHS = (9, 2, 14, 5, 14, 3, 7)
STRENGTHS = (("positive", 3.0), (None, 0.0), ("negative", 1.5), (None, 0.0), ("positive", -1.0), ("negative", 0.5))
WEIGHT, MARGIN = 0.5, 2.0


def examples(strengths=STRENGTHS):
    """Rows of odd lengths with attributes, some with a prompt that is not scored."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length, (name, s) in zip(LENGTHS, strengths, strict=False):
        ids = torch.randint(3, 90, (length,), generator=draw).tolist()
        labels = [IGNORED] * (length // 3) + ids[length // 3 :]
        rows.append(Example(Encoded(ids, labels, True, False), Condition(name, s, "")))
    return rows


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
    conditioner = Conditioner(adapter, [find_attribute(session, name, None) for name in ("negative", "positive")])
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
    total = 0.0
    for group in groups:
        own = {row: slow_nll(adapter, conditioner, examples()[row], 1) for row in group}
        total = total + sum(own.values())
        pairs = []
        for row in group:
            condition = examples()[row].condition
            if condition.strength:
                gap = own[row] - slow_nll(adapter, conditioner, examples()[row], -1)
                pairs.append(F.softplus(MARGIN * abs(condition.strength) + gap))
        if pairs:
            total = total + weight * sum(examples()[row].tokens.scored for row in group) * sum(pairs) / len(pairs)
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
        total = total + contrastive_loss(token_nll(logits, labels), owner, terms, weight, MARGIN) / count
    return total


def gradients(adapter, loss):
    """Gradients of all trained parameters as one vector."""
    adapter.model.zero_grad()
    loss.backward()
    return torch.cat(
        [p.grad.flatten() for p in [p for _, p in adapter.named_parameters()] + [*adapter.mlp.parameters()]]
    )


@pytest.mark.parametrize("scored_only", [False, True], ids=["all", "scored"])
@pytest.mark.parametrize("packed", [False, True], ids=["grouped", "packed"])
@pytest.mark.parametrize("groups", [1, 3])
def test_loss_and_gradients_equal_the_formula(trained, packed, groups, scored_only):
    """In every layout; weight 0 is the plain loss, and twice the count half of it."""
    adapter, conditioner, tolerance = trained
    layout = Layout(packed, attention=0.1, groups=groups, only_scored=scored_only, contrast=True)
    rows = examples()
    by_length = similar_lengths([len(row.tokens.ids) for row in rows], groups)
    scored = sum(row.tokens.scored for row in rows)
    for weight, count in ((WEIGHT, scored), (0.0, 2 * scored)):
        expected = slow_loss(adapter, conditioner, by_length, weight, count)
        loss = fast_loss(adapter, conditioner, layout, [*rows, None], weight, torch.tensor(float(count)))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
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
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
        assert float(fast_loss(adapter, conditioner, layout, [None, None], WEIGHT, 1)) == 0


def test_counts_exclude_opposite_strengths(trained):
    _, conditioner, _ = trained
    plain, contrasted = (
        collate(examples(), Layout(True, contrast=contrast), 1, conditioner) for contrast in (False, True)
    )
    assert (contrasted.tokens, contrasted.scored) == (plain.tokens, plain.scored)
    assert contrasted.computed == contrasted.tokens  # one row has no padding


def test_contrastive_loss_makes_steering_stronger(braces, model_dir, tmp_path):
    """The likelihood of rows of two kinds depends more on the strength than without the loss."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.options import LoadOptions
    from braces_cli.scoring.likelihood import continuation_likelihoods

    rows = tmp_path / "rows.csv"
    kinds = {"positive": "good day good film", "negative": "sad town sad end"}
    rows.write_text("text,attribute\n" + "".join(f"{text},{name}\n" for name, text in kinds.items()) * 16)
    gains = []
    for weight in (0, 1):
        folder = tmp_path / f"w{weight}"
        asked = ["--attribute-field", "attribute", "--opposites", "positive:negative", "--contrast", weight]
        asked += ["--margin", 20] if weight else []
        settings = ["--max-steps", 30, "--batch-size", 8, "--rank", 4, "--warmup-steps", 0, "--device", "cpu"]
        settings += ["--lr", "0.02", "--gate-lr", "0.3"]
        outcome = braces("train", "--model", model_dir, "--data", rows, "--output-dir", folder, *asked, *settings)
        assert outcome.code == 0, outcome.err
        session = open_session(str(model_dir), str(folder), LoadOptions(device="cpu"))
        positive = find_attribute(session, "positive", None)
        gain = 0.0
        for sign, text in zip((1, -1), kinds.values(), strict=True):
            for s in (sign, -sign):
                with steered(session, [(positive, float(s))]):
                    found = continuation_likelihoods(session.base, [("", text)], 1)
                gain += -found[0].nll if s == sign else found[0].nll
        gains.append(gain)
    assert gains[1] > gains[0] + 0.5
