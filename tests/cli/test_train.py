"""`braces train` on a tiny model: JSON, files, and bad input that leaves nothing behind."""

from __future__ import annotations

import json
import math

import pytest

KEYS = {
    "output_dir", "method", "trainable_parameters", "condition_parameters", "total_parameters", "trainable_percent",
    "steps", "epochs", "train_loss", "base_eval_loss", "base_eval_perplexity", "eval_loss", "eval_perplexity",
    "seconds", "tokens", "tokens_per_second", "peak_memory", "resumed_from",
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["good", "sad", "old", "happy"]
    path.write_text("".join(json.dumps({"text": f"the {a} film and the {b} end"}) + "\n" for a in words for b in words))
    return path


def test_training_lowers_the_loss_and_writes_an_adapter(braces, model_dir, rows, tmp_path):
    """The documented JSON keys, parameter count and files, and a lower loss."""
    out = tmp_path / "out"
    outcome = braces(
        "train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--rank", 4, "--max-steps", 40,
        "--lr", 0.01, "--gate-lr", 0.3, "--output-dir", out, "--format", "json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert set(result) >= KEYS
    assert result["trainable_parameters"] == 2 * (4 * 32 + 1)
    assert result["steps"] == 40
    assert result["eval_loss"] < result["base_eval_loss"] - 0.05
    assert result["eval_perplexity"] == pytest.approx(math.exp(result["eval_loss"]))
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in out.iterdir()} == adapter | {"checkpoint-40", "loss.png", "metrics.jsonl", "run.json"}
    assert {p.name for p in (out / "checkpoint-40").iterdir()} == adapter | {
        "manifest.json", "optimizer.json", "optimizer.safetensors", "parameters.safetensors", "rng.json", "run.json",
    }  # fmt: skip

    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.options import LoadOptions
    from braces_cli.data.dataset import Reading, read_examples
    from braces_cli.scoring.likelihood import Likelihood, likelihoods

    session = open_session(None, str(out), LoadOptions(device="cpu"))
    tokenizer = session.base.tokenizer
    examples = read_examples([str(rows)], Reading(tokenizer, 128)).items
    again = sum(likelihoods(session.base.model, examples, tokenizer.pad_token_id, 16), Likelihood())
    assert again.loss == pytest.approx(result["eval_loss"], rel=1e-6)  # the saved adapter was evaluated


def test_the_same_seed_gives_the_same_adapter(braces, model_dir, rows, tmp_path):
    """Bit-identical; another seed gives another adapter."""
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        braces(
            "train",
            "--model",
            model_dir,
            "--data",
            rows,
            "--max-steps",
            3,
            "--seed",
            seed,
            "--output-dir",
            tmp_path / name,
        )
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_gradient_checkpointing_and_accumulation_change_nothing_but_memory(braces, model_dir, rows, tmp_path):
    """Recomputed activations give the same loss."""
    losses = []
    for name, extra in (("a", []), ("b", ["--gradient-checkpointing"])):
        outcome = braces(
            "train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--max-steps", 4, "--rank", 4,
            "--output-dir", tmp_path / name, "--format", "json", *extra,
        )  # fmt: skip
        losses.append(outcome.json["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dry_run_counts_the_parameters_of_layers(braces, model_dir, tmp_path):
    """Without weights; nothing is written."""
    outcome = braces(
        "train", "--model", model_dir, "--rank", 4, "--layers", "1-", "--output-dir", tmp_path / "o", "--dry-run",
        "--format", "json",
    )  # fmt: skip
    assert outcome.json["trainable_parameters"] == 4 * 32 + 1
    assert not (tmp_path / "o").exists()


def test_dry_run_without_a_model_prints_the_settings(braces):
    """`trainable_parameters: null` and the reason."""
    outcome = braces("train", "--model", "Qwen/Qwen2.5-1.5B", "--rank", 4, "--dry-run", "--format", "json")
    assert outcome.code == 0
    assert outcome.json["trainable_parameters"] is None
    assert "Qwen/Qwen2.5-1.5B" in outcome.json["reason"]
    assert outcome.json["settings"]["rank"] == 4


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "GatedRepoError"), (403, "GatedRepoError"), (404, "RepositoryNotFoundError")]
)
def test_gated_model(braces, monkeypatch, rows, tmp_path, status, kind):
    """The message names the page of the model and HF_TOKEN, in two lines."""
    import importlib

    from huggingface_hub import errors
    from transformers import AutoConfig

    def refuse(*args, **kwargs):
        http = importlib.import_module(errors.Response.__module__.partition(".")[0])  # httpx by whatever name
        response = http.Response(status, request=http.Request("GET", "https://huggingface.co/x/y"))
        cause = getattr(errors, kind)("no", response=response)
        raise OSError("You are trying to access a gated repo.\nMany lines more.") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    outcome = braces("train", "--model", "x/y", "--data", rows, "--output-dir", tmp_path / "o")
    assert outcome.code == 4
    assert len(outcome.err.strip().splitlines()) == 2
    assert "https://huggingface.co/x/y" in outcome.err
    assert "HF_TOKEN" in outcome.err
