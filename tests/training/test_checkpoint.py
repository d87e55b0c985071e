"""Checkpoints: their files, resumed runs compared with uninterrupted ones, and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import braces_cli.training.loop as trainer
import braces_cli.training.run as training
from braces_cli.core.adapter.model import open_session
from braces_cli.core.distributed import deferred
from braces_cli.core.files import write_json
from braces_cli.core.options import LoadOptions
from braces_cli.training.checkpoint import (
    RNG_FILE,
    Record,
    checkpoints,
    newest,
    prepare_folder,
    restore_rng,
    rng_state,
    write_checkpoint,
)

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def rows(tmp_path):
    """Sentences with moods, for training with attributes."""
    path = tmp_path / "rows.jsonl"
    moods = [("good", "positive"), ("sad", "negative"), ("old", "neutral")]
    lines = [
        {"text": f"the {noun} is {word}", "mood": mood} for noun in ("film", "town", "end") for word, mood in moods
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def train(braces, model_dir, rows):
    """`braces train` with twelve steps of two batches."""

    def call(out, *extra):
        return braces(
            "train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--rank", 4, "--max-steps", 12,
            "--batch-size", 2, "--gradient-accumulation", 2, "--lr", 0.01, "--logging-steps", 2, "--save-steps", 5,
            "--save-total-limit", 0, "--output-dir", out, "--format", "json", *extra,
        )  # fmt: skip

    return call


def signal_after(monkeypatch, steps: int, number: int) -> None:
    """Send a signal to this process during the first logged step after `steps`."""
    real = trainer.Trainer._figures
    sent = []

    def figures(self):
        row = real(self)
        if self.step >= steps and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return row

    monkeypatch.setattr(trainer.Trainer, "_figures", figures)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--streaming"],
        ["--gradient-checkpointing"],
        ["--attribute-field", "mood", "--opposites", "positive:negative"],
        ["--attribute-field", "mood", "--packing", "off"],
    ],
    ids=["default", "streaming", "gradient checkpointing", "attributes", "attributes unpacked"],
)
def test_resumed_run_is_bit_identical(train, tmp_path, extra):
    """From the middle of an epoch and from the end; figures too, except times and memory."""
    one = train(tmp_path / "one", *extra)
    assert one.code == 0, one.err
    assert [path.name for path in checkpoints(tmp_path / "one")] == ["checkpoint-5", "checkpoint-10", "checkpoint-12"]
    expected = (tmp_path / "one" / ADAPTER).read_bytes()
    for step in (5, 12):
        out = tmp_path / f"from-{step}"
        out.mkdir()
        os.rename(tmp_path / "one" / f"checkpoint-{step}", out / f"checkpoint-{step}")
        (out / "metrics.jsonl").write_bytes((tmp_path / "one" / "metrics.jsonl").read_bytes() + b'{"step": 1')
        again = train(out, *extra, "--resume")
        assert again.code == 0, again.err
        assert (out / ADAPTER).read_bytes() == expected
        assert again.json["resumed_from"] == str(out / f"checkpoint-{step}")
        other = {"output_dir", "seconds", "tokens_per_second", "peak_memory", "resumed_from"}
        assert {k: v for k, v in again.json.items() if k not in other} == {
            k: v for k, v in one.json.items() if k not in other
        }
        logged = [read(tmp_path / "one"), read(out)]
        assert logged[0] == logged[1]
    assert [row["step"] for row in logged[0]] == [2, 4, 6, 8, 10, 12]


def test_the_relevance_scale_is_measured_once(train, tmp_path, monkeypatch):
    """A resumed or continued run reads c of each layer from its files."""
    calls = []

    def measured(model, ffns, texts):
        calls.append(len(texts))
        return [3.0, 5.0]

    monkeypatch.setattr("braces_cli.training.run.measure_scales", measured)
    assert train(tmp_path / "one").code == 0
    out = tmp_path / "from-5"
    out.mkdir()
    os.rename(tmp_path / "one" / "checkpoint-5", out / "checkpoint-5")
    assert train(out, "--resume").code == 0
    assert train(tmp_path / "more", "--adapter", tmp_path / "one").code == 0
    for folder in (tmp_path / "one", out, tmp_path / "more"):
        assert json.loads((folder / "adapter_config.json").read_text())["relevance_scale"] == [3.0, 5.0]
    assert len(calls) == 1
    assert (out / ADAPTER).read_bytes() == (tmp_path / "one" / ADAPTER).read_bytes()


def read(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("tokens_per_second") > 0
    return rows


def test_a_checkpoint_is_an_adapter_without_pickle(train, tmp_path):
    """Only safetensors, JSON and Markdown; the unconstrained parameters are separate."""
    train(tmp_path / "one")
    folder = tmp_path / "one" / "checkpoint-5"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    session = open_session(None, str(folder), LoadOptions(device="cpu"))
    assert session.adapter is not None
    raw = load_file(folder / "parameters.safetensors")
    weight = next(tensor for name, tensor in raw.items() if name.endswith("layers.0.mlp.relevance.weight"))
    projection = load_file(folder / ADAPTER)["layers.0.projection"]
    assert (weight @ weight.mT - projection @ projection.mT).abs().max() > 1e-3  # unconstrained rows have other lengths


def test_resumed_run_uses_the_original_attributes(train, braces, model_dir, tmp_path, monkeypatch):
    """States that differ by rounding come from the checkpoint; other words are refused."""
    built = ["attr-build", "--model", model_dir, "--output-dir", tmp_path / "built", "--quiet"]
    for name, words in (("positive", "good,film"), ("negative", "sad")):
        assert braces(*built, "--attribute", name, "--words", words).code == 0
    extra = ["--attribute-field", "mood", "--attributes", tmp_path / "built"]
    one = train(tmp_path / "one", *extra)
    assert one.code == 0, one.err
    expected = (tmp_path / "one" / ADAPTER).read_bytes()
    (tmp_path / "two").mkdir()
    os.rename(tmp_path / "one" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    assert braces(*built, "--attribute", "positive", "--words", "old,town", "--overwrite").code == 0
    other = train(tmp_path / "two", *extra, "--resume")
    assert other.code == 2
    assert "attribute `positive` has changed since the run was started" in other.err
    # A repeated word changes the state very little, but the list differs.
    assert braces(*built, "--attribute", "positive", "--words", "good,film,good film", "--overwrite").code == 0
    assert "has changed since the run was started" in train(tmp_path / "two", *extra, "--resume").err
    assert braces(*built, "--attribute", "positive", "--words", "good,film", "--overwrite").code == 0
    real = training.gather_attributes
    rounded = lambda *given: [replace(each, hidden=each.hidden + 1e-3 * each.state) for each in real(*given)]  # noqa: E731
    monkeypatch.setattr(training, "gather_attributes", rounded)
    assert train(tmp_path / "two", *extra, "--resume").code == 0
    assert (tmp_path / "two" / ADAPTER).read_bytes() == expected


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal; background jobs of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored():
    """As in a background job of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred() as request:
            signal.raise_signal(signal.SIGINT)
        assert request.number == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(train, tmp_path, monkeypatch, interruptible, number, code):
    """Exit 130 or 143 with a checkpoint of that step; the resumed run is bit-identical."""
    train(tmp_path / "one")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_after(patch, 6, number)
        stopped = train(tmp_path / "two", "--save-steps", 0)
    assert stopped.code == code
    assert stopped.json["error"]["code"] == code
    assert "--resume" in stopped.err
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["checkpoint-7"]
    assert not (tmp_path / "two" / ADAPTER).exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train(tmp_path / "two", "--resume").code == 0
    assert (tmp_path / "two" / ADAPTER).read_bytes() == (tmp_path / "one" / ADAPTER).read_bytes()


def test_finished_run_is_unchanged(train, tmp_path):
    """The stored result is returned, also with other save steps or another device."""
    first = train(tmp_path / "o").json
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")}
    again = train(tmp_path / "o", "--resume", "--save-steps", 3, "--logging-steps", 1, "--device", "cpu")
    assert again.code == 0
    assert again.json == {**first, "resumed_from": str(tmp_path / "o")}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")} == before


def test_other_settings_are_refused(train, tmp_path):
    """Exit 2 with all differing settings, before and after the end of a run; no file is changed."""
    train(tmp_path / "o")
    faults = [
        (["--lr", "0.02", "--seed", "3"], ["--lr 0.02 (was 0.01)", "--seed 3 (was 0)"]),
        (["--batch-size", "8"], ["--examples-per-step 16 (was 4)"]),
        (["--overwrite"], ["--resume and --overwrite are mutually exclusive"]),
    ]
    for finished in (True, False):
        if not finished:
            for name in ("run.json", "adapter_config.json"):
                (tmp_path / "o" / name).unlink()
        before = sorted((tmp_path / "o").rglob("*"))
        for extra, words in faults:
            outcome = train(tmp_path / "o", "--resume", *extra)
            assert outcome.code == 2
            assert all(word in outcome.err for word in words), outcome.err
            assert len(outcome.err.strip().splitlines()) == 2
            assert sorted((tmp_path / "o").rglob("*")) == before


def test_other_rows_and_other_adapters_are_refused(train, tmp_path, rows, adapter_dir):
    out = tmp_path / "o"
    train(out)
    (out / "run.json").unlink()
    text = rows.read_text()
    rows.write_text(text.replace("sad", "bad"))
    outcome = train(out, "--resume")
    assert outcome.code == 2
    assert "the rows are not those of the checkpoint" in outcome.err
    rows.write_text(text)
    outcome = train(adapter_dir, "--resume")
    assert outcome.code == 2
    assert "not from a run that can be resumed" in outcome.err


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_damaged_checkpoint_is_refused(train, tmp_path):
    """Exit 4 with the file that was changed, cut, removed or swapped, and the checkpoint before."""
    out = tmp_path / "o"
    train(out)
    for name in ("run.json", "adapter_config.json"):
        (out / name).unlink()
    last, before = out / "checkpoint-12", out / "checkpoint-10"
    names = sorted(path.name for path in last.iterdir() if path.name not in ("README.md", "manifest.json"))
    assert set(names) == set(json.loads((last / "manifest.json").read_text())["sha256"])
    damages = [(name, flip) for name in names]
    damages += [(name, lambda path: path.write_bytes(path.read_bytes()[:100])) for name in names]
    damages += [(name, lambda path: swap(path, before / path.name)) for name in [*names, "manifest.json"]]
    damages += [("rng.json", Path.unlink), ("run.json", pipe), ("manifest.json", lambda path: path.write_text("{}"))]
    damages += [("manifest.json", pipe)]
    shutil.copytree(out, tmp_path / "copy")
    for name, damage in damages:
        if (last / name).read_bytes() == (before / name).read_bytes() and damage not in (flip, Path.unlink, pipe):
            continue  # equal in both checkpoints
        damage(last / name)
        outcome = train(out, "--resume")
        assert outcome.code == 4, (name, outcome.err)
        assert str(last / name) in outcome.err
        assert "--resume then continues from checkpoint-10" in outcome.err
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "copy", out)
    (last / "README.md").write_text("mine")
    assert train(out, "--resume").code == 0


def test_full_disk_keeps_the_previous_checkpoint(train, tmp_path, monkeypatch):
    """Exit 1; --resume then continues."""
    train(tmp_path / "one")
    real, calls = trainer.write_checkpoint, []

    def full(folder, step, limit, write):
        calls.append(step)
        if step == 5:
            return real(folder, step, limit, write)
        import resource

        # The kernel refuses to write more than 2000 bytes to a file, as on a full disk.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            return real(folder, step, limit, write)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_checkpoint", full)
        outcome = train(tmp_path / "two")
    assert outcome.code == 1
    assert calls == [5, 10]
    assert "cannot write the checkpoint" in outcome.err
    assert "checkpoint-5 is kept" in outcome.err
    assert [path.name for path in (tmp_path / "two").glob("*check*")] == ["checkpoint-5"]
    assert train(tmp_path / "two", "--resume").code == 0
    assert (tmp_path / "two" / ADAPTER).read_bytes() == (tmp_path / "one" / ADAPTER).read_bytes()


def test_random_generators_are_restored(tmp_path):
    """Through JSON."""

    def draw():
        return float(torch.rand(()))

    draw()
    write_json(tmp_path / RNG_FILE, [rng_state()])
    drawn = draw()
    assert draw() != drawn
    restore_rng(tmp_path)
    assert draw() == drawn


def test_killed_write_leaves_a_complete_checkpoint(tmp_path):
    """Partial files are removed."""
    write_checkpoint(tmp_path, 2, 0, lambda folder: (folder / "a").write_text("two"))

    class Killed(BaseException):
        pass

    def half(folder):
        (folder / "a").write_text("tw")
        raise Killed

    with pytest.raises(Killed):
        write_checkpoint(tmp_path, 4, 0, half)
    (tmp_path / ".checkpoint-6.x").mkdir()
    (tmp_path / ".run.json.12345678.partial").touch()
    (tmp_path / ".mine").touch()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-2"
    prepare_folder(tmp_path, True, Record(), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoint-2", "checkpoint-of-mine"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_overwrite_removes_old_checkpoints(train, tmp_path):
    """At most --save-total-limit checkpoints are kept."""
    train(tmp_path / "o")
    train(tmp_path / "o", "--overwrite", "--max-steps", 4, "--save-steps", 1, "--save-total-limit", 2)
    assert [path.name for path in checkpoints(tmp_path / "o")] == ["checkpoint-3", "checkpoint-4"]
    assert [row["step"] for row in read(tmp_path / "o")] == [2, 4]
