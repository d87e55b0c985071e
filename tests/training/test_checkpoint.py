"""Checkpoints: their files, resumed runs compared with uninterrupted ones, and damaged files."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import braces_cli
import braces_cli.training.loop as trainer
import braces_cli.training.run as training
from braces_cli.core.adapter.model import open_session
from braces_cli.core.distributed import deferred
from braces_cli.core.files import write_json
from braces_cli.core.options import LoadOptions
from braces_cli.training import checkpoint as checkpointing
from tests.conftest import make_adapter, write_rows

SETTINGS: dict[str, Any] = {
    "rank": 4, "lr": 0.01, "device": "cpu", "max_steps": 8, "batch_size": 2, "gradient_accumulation": 2,
    "logging_steps": 2, "save_steps": 5, "save_total_limit": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Sentences with moods, for training with attributes."""
    moods = [("good", "positive"), ("sad", "negative"), ("old", "neutral")]
    lines = [
        {"text": f"the {noun} is {word}", "mood": mood} for noun in ("film", "town", "end") for word, mood in moods
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines)


@pytest.fixture(scope="module")
def finished_run(model_dir, rows, tmp_path_factory):
    """Folder of a run of eight steps with two checkpoints, made once."""
    out = tmp_path_factory.mktemp("finished") / "one"
    braces_cli.train(rows, out, model=model_dir, eval_data=rows, **SETTINGS)
    return out


@pytest.fixture
def one(finished_run, tmp_path):
    """A copy of `finished_run`."""
    return shutil.copytree(finished_run, tmp_path / "one")


@pytest.fixture
def run(train, rows):
    """`braces train` with the settings of `finished_run` and more options."""
    options = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    return lambda out, *more: train(out, "--eval-data", rows, *options, *more, data=rows)


def unfinished(folder: Path, source: Path, *steps: int) -> Path:
    """A folder with checkpoints of the run in `source` only."""
    for step in steps:
        shutil.copytree(source / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def content(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


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
        ["--gradient-checkpointing", "--relevance-to", "output"],
        ["--attribute-field", "mood", "--opposites", "positive:negative"],
        ["--attribute-field", "mood", "--packing", "off"],
    ],
    ids=["default", "streaming", "gradient checkpointing", "attributes", "attributes unpacked"],
)
def test_resumed_run_is_bit_identical(run, tmp_path, extra):
    """From the middle of an epoch and from the end; figures too, except times and memory."""
    first = run(tmp_path / "one", *extra)
    assert first.code == 0, first.err
    assert [path.name for path in checkpointing.checkpoints(tmp_path / "one")] == ["checkpoint-5", "checkpoint-8"]
    for step in (5, 8):
        out = unfinished(tmp_path / f"from-{step}", tmp_path / "one", step)
        (out / "metrics.jsonl").write_bytes((tmp_path / "one" / "metrics.jsonl").read_bytes() + b'{"step": 1')
        again = run(out, *extra, "--resume")
        assert again.code == 0, again.err
        assert content(out) == content(tmp_path / "one")
        assert again.json["resumed_from"] == str(out / f"checkpoint-{step}")
        other = {"output_dir", "seconds", "tokens_per_second", "peak_memory", "resumed_from"}
        results = [{k: v for k, v in each.json.items() if k not in other} for each in (first, again)]
        assert results[0] == results[1]
        assert read(out) == read(tmp_path / "one")
    assert [row["step"] for row in read(out)] == [2, 4, 6, 8]


def test_the_relevance_scale_is_measured_once(run, tmp_path, monkeypatch):
    """A resumed or continued run reads c of each layer from its files."""
    calls = []
    monkeypatch.setattr("braces_cli.training.run.measure_scales", lambda *args: calls.append(args) or [3.0, 5.0])
    assert run(tmp_path / "one").code == 0
    assert run(unfinished(tmp_path / "two", tmp_path / "one", 5), "--resume").code == 0
    assert run(tmp_path / "more", "--adapter", tmp_path / "one").code == 0
    for name in ("one", "two", "more"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["relevance_scale"] == [3.0, 5.0]
    assert len(calls) == 1
    assert content(tmp_path / "two") == content(tmp_path / "one")


def read(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("tokens_per_second") > 0
    return rows


def test_a_checkpoint_is_an_adapter_without_pickle(finished_run):
    """Only safetensors, JSON and Markdown."""
    folder = finished_run / "checkpoint-5"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    assert open_session(None, str(folder), LoadOptions(device="cpu")).adapter is not None


def test_resumed_run_uses_the_original_attributes(run, braces, model_dir, tmp_path, monkeypatch):
    """States that differ by rounding come from the checkpoint; other words are refused."""

    def build(name, words):
        options = ("--attribute", name, "--words", words, "--output-dir", tmp_path / "built", "--overwrite")
        assert braces("attr-build", "--model", model_dir, *options).code == 0

    build("positive", "good,film")
    build("negative", "sad")
    extra = ("--attribute-field", "mood", "--attributes", tmp_path / "built")
    first = run(tmp_path / "one", *extra)
    assert first.code == 0, first.err
    two = unfinished(tmp_path / "two", tmp_path / "one", 5)
    # A repeated word changes the state very little, but the list differs.
    build("positive", "good,film,good film")
    refused = run(two, *extra, "--resume")
    assert refused.code == 2
    assert "attribute `positive` has changed since the run was started" in refused.err
    build("positive", "good,film")
    real = training.gather_attributes
    rounded = lambda *given: [replace(each, hidden=each.hidden + 1e-3 * each.state) for each in real(*given)]  # noqa: E731
    monkeypatch.setattr(training, "gather_attributes", rounded)
    assert run(two, *extra, "--resume").code == 0
    assert content(two) == content(tmp_path / "one")


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
def test_a_signal_finishes_the_step_and_saves(run, finished_run, tmp_path, monkeypatch, interruptible, number, code):
    """Exit 130 or 143 with a checkpoint of that step; the resumed run is bit-identical."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    out = tmp_path / "two"
    with monkeypatch.context() as patch:
        signal_after(patch, 6, number)
        stopped = run(out, "--save-steps", 0)
    assert stopped.code == code
    assert stopped.json["error"]["code"] == code
    assert "--resume" in stopped.err
    assert [path.name for path in checkpointing.checkpoints(out)] == ["checkpoint-7"]
    assert not (out / "adapter_model.safetensors").exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert run(out, "--resume").code == 0
    assert content(out) == content(finished_run)


def test_finished_run_is_unchanged(run, one):
    """The stored result is returned, also with other save steps or another device."""
    first = json.loads((one / "run.json").read_text())["result"]
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    again = run(one, "--resume", "--save-steps", 3, "--logging-steps", 1, "--device", "auto")
    assert again.code == 0, again.err
    assert again.json == {**first, "resumed_from": str(one)}
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*")} == before


def test_other_settings_are_refused(run, one):
    """Exit 2 with all differing settings, before and after the end of a run; no file is changed."""
    faults = [
        (["--lr", "0.02", "--seed", "3"], ["--lr 0.02 (was 0.01)", "--seed 3 (was 0)"]),
        (["--batch-size", "8"], ["--examples-per-step 16 (was 4)"]),
    ]
    for finished in (True, False):
        if not finished:
            for name in ("run.json", "adapter_config.json"):
                (one / name).unlink()
        before = sorted(one.rglob("*"))
        for extra, words in faults:
            outcome = run(one, "--resume", *extra)
            assert outcome.code == 2
            assert all(word in outcome.err for word in words), outcome.err
            assert len(outcome.err.strip().splitlines()) == 2
            assert sorted(one.rglob("*")) == before


@pytest.mark.parametrize("streaming", [False, True])
def test_other_content_is_refused(train, run, adapter_dir, model_dir, tmp_path, monkeypatch, session, streaming):
    """Tokens, labels, attribute and strength of a row, which a stream reads while it trains; adapter and base."""
    monkeypatch.setattr("braces_cli.data.dataset.HEAD", 2)
    rows, base, number = tmp_path / "rows.jsonl", shutil.copytree(model_dir, tmp_path / "base"), count()
    words = {"good": "positive", "sad": "negative", "old": "positive"}
    old = [{"prompt": "the end", "completion": f" is {word}", "mood": mood, "how": 2} for word, mood in words.items()]
    options = ("--adapter", adapter_dir, "--attribute-field", "mood", "--strength-field", "how", "--batch-size", 3)
    options += ("--max-steps", 2, "--save-steps", 1, *(["--streaming"] if streaming else ["--eval-data", rows]))

    def resumed(new):
        out = unfinished(tmp_path / f"from-{next(number)}", tmp_path / "one", 1)
        return train(out, *options, "--resume", data=write_rows(tmp_path / "train.jsonl", new), base=base)

    write_rows(rows, old)
    assert train(tmp_path / "one", *options, data=write_rows(tmp_path / "train.jsonl", old), base=base).code == 0
    where = "the rows of the stream have" if streaming else "the content of --data has"
    split = {"prompt": "the end is", "completion": " old"}
    for change in ({"prompt": "the day"}, split, {"mood": "negative"}, {"how": 1}):
        outcome = resumed([*old[:2], {**old[2], **change}])
        assert (outcome.code, f"{where} changed since" in outcome.err) == (2, True), outcome.err
    assert resumed(old).code == 0
    write_rows(rows, old[1:])
    make_adapter(session, adapter_dir, seed=2)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    parts = ["--adapter", "--model"] if streaming else ["--eval-data", "--adapter", "--model"]
    assert f"the content of {' and '.join(parts)} has changed" in resumed(old).err
    assert "not from a run that can be resumed" in run(adapter_dir, "--resume").err


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


def test_damaged_checkpoint_is_refused(run, one, tmp_path):
    """Exit 4 with the file that was changed, cut, removed or swapped, and the checkpoint before."""
    last, before = (one / f"checkpoint-{step}" for step in (8, 5))
    names = sorted(path.name for path in last.iterdir() if path.name not in ("README.md", "manifest.json"))
    assert set(names) == set(json.loads((last / "manifest.json").read_text())["sha256"])
    damages = [(name, flip) for name in names]
    damages += [("parameters.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100]))]
    damages += [(name, lambda path: swap(path, before / path.name)) for name in ("optimizer.json", "manifest.json")]
    damages += [("rng.json", Path.unlink), ("run.json", pipe), ("manifest.json", lambda path: path.write_text("{}"))]
    damages += [("manifest.json", pipe)]
    for number, (name, damage) in enumerate(damages):
        out = unfinished(tmp_path / str(number), one, 5, 8)
        last, before = (out / f"checkpoint-{step}" for step in (8, 5))
        damage(last / name)
        outcome = run(out, "--resume")
        assert outcome.code == 4, (name, outcome.err)
        assert str(last / name) in outcome.err
        assert "--resume then continues from checkpoint-5" in outcome.err
    out = unfinished(tmp_path / "card", one, 8)
    (out / "checkpoint-8" / "README.md").write_text("mine")
    assert run(out, "--resume").code == 0


def test_full_disk_keeps_the_previous_checkpoint(run, finished_run, tmp_path, monkeypatch):
    """Exit 1; --resume then continues."""
    real, calls = trainer.checkpointing.write_checkpoint, []

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
        patch.setattr(trainer.checkpointing, "write_checkpoint", full)
        outcome = run(tmp_path / "two")
    assert outcome.code == 1
    assert calls == [5, 8]
    assert "cannot write the checkpoint" in outcome.err
    assert "checkpoint-5 is kept" in outcome.err
    assert [path.name for path in (tmp_path / "two").glob("*check*")] == ["checkpoint-5"]
    assert run(tmp_path / "two", "--resume").code == 0
    assert content(tmp_path / "two") == content(finished_run)


def test_random_generators_are_restored(tmp_path):
    """Through JSON."""

    def draw():
        return float(torch.rand(()))

    draw()
    write_json(tmp_path / checkpointing.RNG_FILE, [checkpointing.rng_state()])
    drawn = draw()
    assert draw() != drawn
    checkpointing.restore_rng(tmp_path)
    assert draw() == drawn


def test_killed_write_leaves_a_complete_checkpoint(tmp_path):
    """Partial files are removed."""
    checkpointing.write_checkpoint(tmp_path, 2, 0, lambda folder: (folder / "a").write_text("two"))

    class Killed(BaseException):
        pass

    def half(folder):
        (folder / "a").write_text("tw")
        raise Killed

    with pytest.raises(Killed):
        checkpointing.write_checkpoint(tmp_path, 4, 0, half)
    (tmp_path / ".checkpoint-6.x").mkdir()
    (tmp_path / ".run.json.12345678.partial").touch()
    (tmp_path / ".mine").touch()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert checkpointing.newest(tmp_path) == tmp_path / "checkpoint-2"
    checkpointing.prepare_folder(tmp_path, True, checkpointing.Record())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoint-2", "checkpoint-of-mine"]
    assert checkpointing.checkpoints(tmp_path / "nowhere") == []


def test_overwrite_removes_old_checkpoints(run, one):
    """At most --save-total-limit checkpoints are kept."""
    run(one, "--overwrite", "--max-steps", 4, "--save-steps", 1, "--save-total-limit", 2)
    assert [path.name for path in checkpointing.checkpoints(one)] == ["checkpoint-3", "checkpoint-4"]
    assert [row["step"] for row in read(one)] == [2, 4]
