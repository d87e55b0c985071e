"""The training loop: metrics, divergence, reporters and memory."""

import sys
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

import braces_cli.training.run as trainer
import braces_cli.training.settings as settings
from braces_cli.core.adapter import gram
from braces_cli.core.adapter.model import attach
from braces_cli.data.dataset import Example, Reading, read_examples
from braces_cli.training.checkpoint import trained
from braces_cli.training.loop import Trainer
from braces_cli.training.report import read_metrics
from tests.core.comparison import relative
from tests.training.test_batching import alone


@pytest.fixture
def run(train, mood_rows, tmp_path):
    """`braces train` with six steps of two rows."""
    options = ("--eval-data", mood_rows, "--max-steps", 6, "--batch-size", 2)
    return lambda *more, out=tmp_path / "out": train(out, *options, *more)


def test_metrics_curve_and_card(run, tmp_path, mood_rows, monkeypatch):
    """One row per log step, evaluations when due; the card has data, curve and command."""
    clock, measure, added = time.perf_counter, trainer.measure, [0]

    def slow(*args):
        added[0] += 1000
        return measure(*args)

    monkeypatch.setattr(trainer, "measure", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + added[0])
    outcome = run("--logging-steps", 2, "--eval-steps", 3)
    assert outcome.code == 0, outcome.err
    found = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in found] == [2, 3, 4, 6]
    for row in found:
        if row["step"] == 3:
            assert set(row) == {"step", "epoch", "eval_loss", "eval_perplexity"}
        else:
            assert set(row) == {
                "step", "epoch", "loss", "lr", "gate_lr", "grad_norm", "tokens", "tokens_per_second",
            }  # fmt: skip
    assert found[-1]["tokens"] == outcome.json["tokens"]
    # Evaluations of 1,000 seconds are not in the times.
    assert outcome.json["seconds"] < 900
    assert found[2]["tokens_per_second"] > found[0]["tokens"] / 900
    mean = sum(row["loss"] for row in found if "loss" in row) / 3
    assert outcome.json["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "![Loss by optimizer step](loss.png)" in card
    assert f"| data | {mood_rows.name} |" in card
    assert str(tmp_path) not in card
    assert "    braces " in card
    assert "| rank | 4 |" in card


def test_a_run_is_the_plain_loop(train, session, mood_rows, tmp_path):
    """AdamW without weight decay, from gates of -5; gradients cut at norm 1, rates linear after a quarter."""
    options = ("--max-steps", 7, "--batch-size", 12, "--logging-steps", 1, "--relevance-scale", 10000)
    assert train(tmp_path / "out", *options).code == 0
    items = read_examples([str(mood_rows)], Reading(session.base.tokenizer, 128)).items
    adapter = attach(session.base.model, 4, scales=[1e4, 1e4])
    weights, gates = ([getattr(layer, name) for _, layer in adapter.adapted_ffns] for name in ("weight", "gate"))
    assert [float(gate) for gate in gates] == [-5, -5]
    norms, optimizer = [], torch.optim.AdamW([{"params": weights}, {"params": gates}], weight_decay=0)
    for row, part in zip(read_metrics(tmp_path / "out" / "metrics.jsonl"), (0, 6, 5, 4, 3, 2, 1), strict=True):
        for group, name, peak in zip(optimizer.param_groups, ("lr", "gate_lr"), (0.01, 0.3), strict=True):
            group["lr"] = peak * part / 6
            assert row[name] == pytest.approx(group["lr"])
        loss = alone(session.base.model, [Example(item, None) for item in items])
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_([*weights, *gates], 1.0))
        assert (row["loss"], row["grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-4)
        optimizer.step()
        norms.append(norm)
    assert min(norms) < 1 < max(norms)
    stored = load_file(tmp_path / "out" / "checkpoint-7" / "parameters.safetensors")
    for name, parameter in trained(session.base.model).items():
        assert relative(stored[name], parameter) < 1e-4


def test_steps_do_not_wait_for_the_device(run, monkeypatch):
    """No tensor is read in a step that is not logged."""
    reads: Counter[str] = Counter()
    for name in ("item", "__float__", "__int__", "__bool__"):
        real = getattr(torch.Tensor, name)

        def read(self, _real=real):
            reads[sys._getframe(1).f_code.co_filename] += 1
            return _real(self)

        monkeypatch.setattr(torch.Tensor, name, read)
    counts = []
    for steps in (2, 6):
        reads.clear()
        assert run("--max-steps", steps, "--logging-steps", 100, "--save-steps", 0, "--overwrite").code == 0
        # Not counted: the optimizer's step counters on the CPU, and reads of the mask in transformers.
        counts.append({file: n for file, n in reads.items() if "braces_cli" in file or "accelerate" in file})
    assert counts[0] == counts[1]
    assert counts[0]


def test_loss_that_is_not_finite_stops_the_run(run, monkeypatch, tmp_path):
    """Exit 1 with the steps and a hint; no folder is written."""
    real = Trainer._block_loss
    monkeypatch.setattr(Trainer, "_block_loss", lambda *args: real(*args) * float("nan"))
    for each, when in ((2, "between steps 1 and 2"), (1, "at step 1")):
        outcome = run("--logging-steps", each, out=tmp_path / "new" / "out")
        assert outcome.code == 1
        assert f"training diverged: the loss is not finite {when}" in outcome.err
        assert "lower --lr" in outcome.err
        assert not (tmp_path / "new").exists()


def test_diverged_adapter_is_not_saved(run, monkeypatch, tmp_path):
    """The message names the last checkpoint; saved steps are checked even if not logged."""
    real = Trainer._train_step

    def step(self, batches):
        real(self, batches)
        if self.step == 3:
            with torch.no_grad():
                next(iter(trained(self._base).values())).fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_train_step", step)
    outcome = run("--logging-steps", 100, "--save-steps", 1)
    assert outcome.code == 1
    assert "training diverged: the adapter is not finite at step 3" in outcome.err
    assert f"{tmp_path / 'out' / 'checkpoint-2'} was written before" in outcome.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*check*")) == ["checkpoint-1", "checkpoint-2"]


def test_reporters(run, monkeypatch, tmp_path):
    """TensorBoard gets its events; a missing reporter is exit 2 before any work."""
    pytest.importorskip("tensorboard")
    assert run("--report-to", "tensorboard").code == 0
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    outcome = run("--report-to", "wandb", "--overwrite")
    assert outcome.code == 2
    assert "pip install wandb" in outcome.err


@pytest.mark.parametrize(("extra", "made"), [([], 2), (["--eval-steps", 2], 4), (["--gradient-checkpointing"], 0)])
def test_products_of_value_matrices_are_computed_once(run, monkeypatch, extra, made):
    """Once for each of two layers, again after an evaluation, and never with gradient checkpointing."""
    real, calls = gram._slabs, []
    monkeypatch.setattr(gram, "_slabs", lambda *args: calls.append(1) or real(*args))
    outcome = run("--max-steps", 4, *extra)
    assert outcome.code == 0, outcome.err
    assert len(calls) == made
