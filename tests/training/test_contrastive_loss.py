"""The loss that tells opposite strengths apart."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.attributes.attribute import find_attribute
from braces_cli.core.method.adapter import attach
from braces_cli.core.models.tokenization import IGNORED
from braces_cli.training.attribute_conditioning import Conditioner
from braces_cli.training.contrastive_loss import contrastive_loss
from tests.conftest import open_gates


@pytest.fixture
def batch():
    ids = torch.tensor([[0, 5, 6, 7, 8], [0, 9, 10, 11, 1], [0, 12, 13, 14, 15]])
    labels = ids.clone()
    labels[1, 4] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def nll(session, conditioner, batch, strengths):
    """-log p of each row at its strengths, one token at a time."""
    conditioner.apply(strengths)
    with torch.no_grad():
        logits = session.base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chances = logits.log_softmax(-1)
    rows = []
    for row, labels in enumerate(batch["labels"]):
        scored = [t for t in range(1, len(labels)) if labels[t] != IGNORED]
        rows.append(-sum(float(chances[row, t - 1, labels[t]]) for t in scored))
    return rows


def test_the_loss_is_its_formula(session, batch):
    """By hand, with a row at strength 0; weight 0 is the plain loss; half a step's tokens count for half."""
    adapter = attach(session.base.model, 4)
    open_gates(adapter)
    with torch.no_grad():
        adapter.add_mlp(seed=3).down.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    conditioner = Conditioner(adapter, [find_attribute(session, name, None) for name in ("negative", "positive")])
    strengths = torch.tensor([[0.0, 3.0], [0.0, 0.0], [1.5, 0.0]])
    own, other = (nll(session, conditioner, batch, sign * strengths) for sign in (1, -1))
    plain = sum(own) / 11
    gaps = [(own[row] - other[row], abs(float(strengths[row].sum()))) for row in (0, 2)]
    for weight, margin in ((0.0, 2.0), (0.5, 0.0), (0.5, 2.0)):
        pairs = [torch.nn.functional.softplus(torch.tensor(gap + margin * s)) for gap, s in gaps]
        expected = plain + weight * float(sum(pairs)) / 2
        args = (session.base.model, batch, strengths, conditioner, weight, margin)
        assert float(contrastive_loss(*args).detach()) == pytest.approx(expected, rel=1e-5)
        assert float(contrastive_loss(*args, torch.tensor(22)).detach()) == pytest.approx(expected / 2, rel=1e-5)
    none = torch.zeros(3, 2)
    alone = contrastive_loss(session.base.model, batch, none, conditioner, 0.5, 2.0).detach()
    assert float(alone) == pytest.approx(sum(nll(session, conditioner, batch, none)) / 11, rel=1e-5)
    contrastive_loss(session.base.model, batch, strengths, conditioner, 0.5, 2.0).backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for _, parameter in adapter.named_parameters())


def test_training_by_contrast_makes_steering_stronger(braces, model_dir, tmp_path):
    """Rows of two kinds: the likelihood of each answers the strength more than without the contrast."""
    from braces_cli.core.attributes.intervention import steered
    from braces_cli.core.models.load_options import LoadOptions
    from braces_cli.core.session import open_session
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
                    found = continuation_likelihoods(session.base.model, session.base.tokenizer, [("", text)], 64, 1)
                gain += -found[0].nll if s == sign else found[0].nll
        gains.append(gain)
    assert gains[1] > gains[0] + 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--contrast", "1"], "no attributes are trained"),
        (["--contrast", "-1"], "must be zero or a positive number"),
        (["--margin", "-1"], "must be zero or a positive number"),
        (["--margin", "inf"], "must be zero or a positive number"),
        (["--margin", "3"], "there is no contrastive loss"),
        (["--margin", "3", "--attribute-field", "mood", "--contrast", "0"], "there is no contrastive loss"),
    ],
)
def test_bad_input(braces, model_dir, tmp_path, args, message):
    """Told before anything is read."""
    outcome = braces("train", "--model", model_dir, "--data", "x.jsonl", "--output-dir", tmp_path / "o", *args)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
