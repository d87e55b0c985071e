"""What people look at: metrics, the curve, reporters, the model card, and the hub by a stand-in on loopback."""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import braces_cli.training.settings as settings
from braces_cli.training.checkpoint import trained
from braces_cli.training.report import MetricsFile, read_metrics
from tests.conftest import make_adapter


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the {a} film"}) + "\n" for a in ("good", "sad", "old", "happy")))
    return path


@pytest.fixture
def train(braces, model_dir, rows, tmp_path):
    """`braces train` of six steps into `out`."""

    def call(*extra):
        return braces(
            "train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--rank", 4, "--max-steps", 6,
            "--batch-size", 2, "--output-dir", tmp_path / "out", "--format", "json", *extra,
        )  # fmt: skip

    return call


def test_metrics_curve_and_card(train, tmp_path, rows):
    """One object a log step, evaluations where they were asked for; the card shows data, curve and command."""
    outcome = train("--logging-steps", 2, "--eval-steps", 3)
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
    # The rates of the step itself, after a warm-up of one step, a quarter of six: half of step 3 would be another one.
    assert [row["lr"] for row in found if "lr" in row] == pytest.approx([0.0283 * part for part in (1, 0.6, 0.2)])
    assert [row["gate_lr"] for row in found if "lr" in row] == pytest.approx([0.1 * part for part in (1, 0.6, 0.2)])
    assert found[-1]["tokens"] == outcome.json["tokens"]
    mean = sum(row["loss"] for row in found if "loss" in row) / 3
    assert outcome.json["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "![Loss by optimizer step](loss.png)" in card
    assert f"| data | `{rows.name}` |" in card
    assert str(tmp_path) not in card
    assert "    braces " in card
    assert "| rank | 4 |" in card


def test_rows_of_an_earlier_attempt_are_dropped(tmp_path):
    """Those behind the step that training goes on from, and a torn line of a killed process."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 9.0}\n{"st')
    metrics = MetricsFile(path, 2)
    metrics.add({"step": 4, "loss": 2.0, "eval_loss": 3.0, "other": 1.0})
    assert read_metrics(path) == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0, "eval_loss": 3.0}]


def test_no_step_reads_a_number_back(train, monkeypatch):
    """No tensor is read in a step that is not logged: it would wait for an accelerator."""
    import torch

    reads: Counter[str] = Counter()
    for name in ("item", "__float__", "__int__", "__bool__"):
        real = getattr(torch.Tensor, name)

        def read(self, _real=real):
            reads[sys._getframe(1).f_code.co_filename] += 1
            return _real(self)

        monkeypatch.setattr(torch.Tensor, name, read)
    counts = []
    for steps in (4, 12):
        reads.clear()
        assert train("--max-steps", steps, "--logging-steps", 100, "--save-steps", 0, "--overwrite").code == 0
        # Not counted: the optimizer's step counters, on the CPU anyway, and what transformers reads of the mask.
        counts.append({file: n for file, n in reads.items() if "braces_cli" in file or "accelerate" in file})
    assert counts[0] == counts[1]
    assert counts[0]


def test_a_loss_that_is_no_number_ends_the_run_at_once(train, monkeypatch, tmp_path):
    """Rather than after hours: exit 1 with the steps and what to do; no folder is left."""
    from braces_cli.training.loop import Trainer

    real = Trainer._block_loss
    monkeypatch.setattr(Trainer, "_block_loss", lambda *args: real(*args) * float("nan"))
    for each, when in ((2, "between steps 1 and 2"), (1, "at step 1")):
        outcome = train("--logging-steps", each, "--output-dir", tmp_path / "new" / "out")
        assert outcome.code == 1
        assert f"training diverged: the loss is not finite {when}" in outcome.err
        assert "lower --lr" in outcome.err
        assert not (tmp_path / "new").exists()


def test_no_checkpoint_holds_a_diverged_adapter(train, monkeypatch, tmp_path):
    """What was saved before stays and is named; the step that is saved is checked, logged or not."""
    from braces_cli.core.files import write_tensors
    from braces_cli.training.loop import Trainer

    real = Trainer._train_step

    def step(self, batches):
        real(self, batches)
        if self.step == 3:
            with torch.no_grad():
                next(iter(trained(self._base).values())).fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_train_step", step)
    outcome = train("--logging-steps", 100, "--save-steps", 1)
    assert outcome.code == 1
    assert "training diverged: the adapter is not finite at step 3" in outcome.err
    assert f"{tmp_path / 'out' / 'checkpoint-2'} was written before" in outcome.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*check*")) == ["checkpoint-1", "checkpoint-2"]
    write_tensors(tmp_path / "nan.safetensors", {"nan": torch.full((2,), float("nan"))})  # is no fault of the disk


def test_reporters(train, monkeypatch, tmp_path):
    """TensorBoard gets its events; one that is not installed, or that nobody knows, is exit 2 before any work."""
    pytest.importorskip("tensorboard")
    assert train("--report-to", "tensorboard").code == 0
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    for name, words in (
        ("wandb", "pip install wandb"),
        ("tensorboard", "pip install tensorboard"),
        ("paper", "is not one of"),
    ):
        outcome = train("--report-to", name, "--overwrite")
        assert outcome.code == 2
        assert words in outcome.err


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as uploads and downloads of small files need, over a dict of files."""

    files: dict[str, bytes] = {}  # noqa: RUF012  one hub a test
    tokens: list[str | None] = []  # noqa: RUF012
    sha = "0123456789" * 4

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, value: Any, code: int = 200) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {
            "Content-Type": "application/json", "Content-Length": str(len(body)), "X-Repo-Commit": self.sha,
            "ETag": f'"{hash(body) & 0xFFFFFFFF:x}"',
        }.items():  # fmt: skip
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            self.tokens.append(self.headers.get("Authorization"))
            known = self.headers.get("Authorization") == "Bearer hf_good"
            self.reply({"name": "ann", "type": "user"} if known else {"error": "no"}, 200 if known else 401)
        elif "/tree/" in path:
            self.reply(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": f"{index:040x}"}
                    for index, (name, content) in enumerate(self.files.items())
                ]
            )
        elif "/resolve/" in path:
            name = path.rpartition("/")[2]
            self.reply(self.files.get(name, b""), 200 if name in self.files else 404)
        else:
            self.reply({"id": "ann/film", "sha": self.sha, "siblings": [{"rfilename": name} for name in self.files]})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://localhost:{self.server.server_address[1]}"  # type: ignore[index]
        if self.path == "/api/repos/create":
            self.reply({"url": f"{host}/ann/film", "id": "ann/film", "name": "ann/film"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            given = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in given]
            self.reply({"files": modes})
        else:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.reply({"commitOid": self.sha, "commitUrl": f"{host}/ann/film/commit/{self.sha}", "success": True})


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type[Hub]]:
    """A hub on loopback, and huggingface_hub pointed at it with an empty cache and a good token."""
    from huggingface_hub import constants

    Hub.files, Hub.tokens = {}, []
    server = ThreadingHTTPServer(("localhost", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_adapter_goes_to_the_hub_and_comes_back(train, braces, hub, tmp_path):
    """--push-to-hub uploads the adapter, its card and its pictures, nothing else; --adapter OWNER/NAME loads it."""
    outcome = train("--push-to-hub", "ann/film", "--logging-steps", 2)
    assert outcome.code == 0, outcome.err
    assert set(hub.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.jsonl",
    }  # fmt: skip
    for name, content in hub.files.items():
        assert content == (tmp_path / "out" / name).read_bytes()
    found = braces("inspect", "--adapter", "ann/film", "--format", "json")
    assert found.code == 0, found.err
    local = braces("inspect", "--adapter", tmp_path / "out", "--format", "json")
    assert found.json["layers"] == local.json["layers"]


def test_a_push_that_cannot_work_is_refused_before_training(train, hub, monkeypatch, tmp_path):
    """A bad name, a token that the hub does not know, no network: exit 2, nothing written."""
    from huggingface_hub import constants

    assert "is not a repository" in train("--push-to-hub", "a/b/c").err
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_bad")
        refused = train("--push-to-hub", "ann/film")
    assert refused.code == 2
    assert "HF_TOKEN" in refused.err
    assert hub.tokens == ["Bearer hf_bad"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused = train("--push-to-hub", "ann/film")
    assert refused.code == 2
    assert "HF_HUB_OFFLINE" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_keeps_the_adapter_and_is_tried_again(train, hub, monkeypatch, tmp_path):
    """Exit 1 after training; --resume uploads what is there."""
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "do_POST", lambda self: self.reply({"error": "out of order"}, 400))
        outcome = train("--push-to-hub", "ann/film")
    assert outcome.code == 1
    assert "--resume tries the upload again" in outcome.err
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert train("--push-to-hub", "ann/film", "--resume").code == 0
    assert "adapter_config.json" in hub.files


def test_a_hub_adapter_that_is_not_there(braces, hub, session, tmp_path):
    """Exit 4 in two lines."""
    make_adapter(session, tmp_path / "local")
    outcome = braces("inspect", "--adapter", "ann/film")
    assert outcome.code == 4
    assert len(outcome.err.strip().splitlines()) == 2
    assert Path(tmp_path / "local").is_dir()
