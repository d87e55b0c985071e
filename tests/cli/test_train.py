"""`braces train` on a tiny model: results, rows of every form, `--check`, `--dry-run`, and bad input."""

import importlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from braces_cli.core.adapter.model import open_session
from braces_cli.core.options import LoadOptions
from braces_cli.data.dataset import Reading, read_examples
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from tests.conftest import write_rows
from tests.core.comparison import relative
from tests.core.models.test_chat import CHAT, TEMPLATES

WORDS = ["the", "film", "is", "good", "and", "end", "sad", "old", "town", "happy", "day"]
KEYS = {
    "output_dir", "method", "trainable_parameters", "condition_parameters", "total_parameters", "trainable_percent",
    "steps", "epochs", "train_loss", "base_eval_loss", "base_eval_perplexity", "eval_loss", "eval_perplexity",
    "seconds", "tokens", "tokens_per_second", "peak_memory", "resumed_from",
}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """30 rows of very different lengths, with attributes."""
    draw = random.Random(0)
    moods = [("positive", 1.5), ("negative", -1.0), (None, 0)]
    texts = ["".join(f" {draw.choice(WORDS)}" for _ in range(draw.randint(1, 25))) for _ in range(30)]
    return write_rows(
        tmp_path / "rows.jsonl",
        (
            {"prompt": "the", "completion": text, "mood": moods[number % 3][0], "how": moods[number % 3][1]}
            for number, text in enumerate(texts)
        ),
    )


def test_training_lowers_the_loss_and_writes_an_adapter(train: Any, mood_rows: Path, tmp_path: Path) -> None:
    """The documented JSON keys, parameter count and files, and a lower loss."""
    out = tmp_path / "out"
    outcome = train(out, "--eval-data", mood_rows, "--max-steps", 30, "--gate-lr", 0.3)
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert set(result) >= KEYS
    assert result["trainable_parameters"] == 2 * (4 * 32 + 1)
    assert result["steps"] == 30
    assert result["eval_loss"] < result["base_eval_loss"] - 0.05
    assert result["eval_perplexity"] == pytest.approx(math.exp(result["eval_loss"]))
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    more = {"checkpoint-30", "loss.png", "metrics.jsonl", "run.json", "settings.yaml"}
    assert {p.name for p in out.iterdir()} == adapter | more
    assert {p.name for p in (out / "checkpoint-30").iterdir()} == adapter | {
        "manifest.json", "optimizer.json", "optimizer.safetensors", "parameters.safetensors", "rng.json", "run.json",
    }  # fmt: skip
    session = open_session(None, str(out), LoadOptions(device="cpu"))
    tokenizer = session.base.tokenizer
    examples = read_examples([str(mood_rows)], Reading(tokenizer, 128, window=128)).items
    again = sum(likelihoods(session.base.model, examples, tokenizer.pad_token_id, 16), Likelihood())
    assert again.loss == pytest.approx(result["eval_loss"], rel=1e-6)  # the saved adapter was evaluated


@pytest.mark.parametrize(
    "fields",
    [(), ("--attribute-field", "mood", "--strength-field", "how", "--contrast", 0)],
    ids=["plain", "attributes"],
)
def test_the_division_of_a_step_changes_nothing(train: Any, rows: Path, tmp_path: Path, fields: Any) -> None:
    """Two epochs with a short last batch: the same examples per step, loss and adapter."""
    ways = {
        "packed": ("--batch-size", 8),
        "grouped": ("--batch-size", 8, "--packing", "off"),
        "accumulated": ("--batch-size", 4, "--gradient-accumulation", 2, "--gradient-checkpointing"),
    }
    found = {}
    for name, options in ways.items():
        outcome = train(tmp_path / name, "--epochs", 2, "--gate-lr", 0.3, *options, *fields, data=rows)
        assert outcome.code == 0, outcome.err
        found[name] = outcome.json, load_file(tmp_path / name / "adapter_model.safetensors")
    expected, weights = found["packed"]
    assert (expected["packed"], found["grouped"][0]["packed"]) == (True, False)
    assert expected["steps"] == 8
    assert expected["padding_share"] <= 0.05 < found["grouped"][0]["padding_share"]
    for name in ("grouped", "accumulated"):
        result, others = found[name]
        assert (result["steps"], result["tokens"]) == (8, expected["tokens"])
        assert result["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        for key, tensor in weights.items():
            assert relative(others[key], tensor) < 1e-4, (name, key)


def test_train_on_chats(train: Any, braces: Any, chatty: Path, tmp_path: Path) -> None:
    """The adapter records chat template, system turn and the end of a turn, for prompts and exports."""
    (tmp_path / "chat.jinja").write_text(TEMPLATES["prefixes"])
    data = write_rows(tmp_path / "chats.jsonl", ({"messages": CHAT, "id": n} for n in range(4)))
    out, merged = tmp_path / "out", tmp_path / "merged"
    options = ("--max-steps", 2, "--chat-template", tmp_path / "chat.jinja", "--system-prompt", "be kind")
    assert train(out, *options, data=data, base=chatty).json["rows_dropped"] == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["training"]["chat_template"], config["end_of_turn"]) == (True, ["</s>"])
    assert config["chat_template"].endswith(TEMPLATES["prefixes"])
    assert braces("merge", "--adapter", out, "--output-dir", merged).code == 0
    assert (merged / "chat_template.jinja").read_text() == config["chat_template"]
    call = ("steer", "--temperature", 0, "--max-new-tokens", 8, "--format", "json", "--adapter", out, "--prompt")
    texts = []
    # Options of the command precede those of the adapter.
    for system, more in (("be kind", ()), ("be sad", ("--system-prompt", "be sad", "--chat-template-kwargs", "x=1"))):
        spelt = f"system:{system}</s><s>user:a day</s><s>assistant:"
        texts.append(braces(*call, "a day", *more).json["text"])
        assert texts[-1] == braces(*call, spelt, "--no-apply-chat-template").json["text"]
    assert texts[0] != texts[1]


def test_a_short_run_reaches_its_rate_and_counts_truncated_rows(train: Any, tmp_path: Path) -> None:
    """Fewer steps than the warm-up; a run in the folder is continued, not overwritten."""
    data = write_rows(tmp_path / "long.jsonl", [{"text": "the film is good " * 60_000}, {"text": "a day"}])
    options = ("--max-steps", 8, "--schedule", "constant", "--logging-steps", 3)
    outcome = train(tmp_path / "out", *options, data=data)
    assert outcome.code == 0, outcome.err
    assert "the warm-up is cut from 20 to 2 steps" in outcome.err
    assert "1 of 2 rows were cut to 128 tokens" in outcome.err
    assert [outcome.json[key] for key in ("rows", "rows_truncated", "rows_dropped")] == [2, 1, 0]
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [3, 6, 8]
    assert metrics[0]["lr"] == pytest.approx(0.01)
    again = train(tmp_path / "out", *options, data=data)
    assert again.code == 2
    assert "--resume continues the run" in again.err


def test_a_plan_shows_the_settings_that_have_an_effect(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    """The parameters of the layers and the context of the model, no options of other methods; nothing is written."""
    (tmp_path / "c.yaml").write_text("packing: off\ncolumns: [text=review]\n")
    call = ("train", "--config", tmp_path / "c.yaml", "--model", model_dir, "--max-steps", 40, "--rank", 4)
    call += ("--layers", "1-", "--output-dir", tmp_path / "o", "--dry-run")
    plan = braces(*call, "--format", "json").json
    assert plan["trainable_parameters"] == 4 * 32 + 1
    assert plan["settings"]["max_length"] == 128
    assert plan["settings"]["packing"] == "off"  # YAML's `off` is text here
    assert plan["settings"]["columns"] == ["text=review"]
    shown = braces(*call).out
    assert "max length" in shown
    for name in ("lora alpha", "epochs", "margin", "strength field"):
        assert name not in shown
    assert not (tmp_path / "o").exists()


def test_gated_model(braces: Any, monkeypatch: pytest.MonkeyPatch, mood_rows: Path, tmp_path: Path) -> None:
    """The message names the page of the model and HF_TOKEN, in two lines."""
    from huggingface_hub import errors
    from transformers import AutoConfig

    def refuse(*args, **kwargs):
        http = importlib.import_module(errors.Response.__module__.partition(".")[0])  # httpx by whatever name
        response = http.Response(401, request=http.Request("GET", "https://huggingface.co/x/y"))
        cause = errors.GatedRepoError("no", response=response)
        raise OSError("You are trying to access a gated repo.\nMany lines more.") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    outcome = braces("train", "--model", "x/y", "--data", mood_rows, "--output-dir", tmp_path / "o")
    assert outcome.code == 4
    assert len(outcome.err.strip().splitlines()) == 2
    assert "https://huggingface.co/x/y" in outcome.err
    assert "HF_TOKEN" in outcome.err


def test_an_unknown_strength_field_is_refused(train: Any, braces: Any, model_dir: Path, rows: Path) -> None:
    """With a similar name; also in a stream."""
    for more in (["--check"], ["--streaming", "--max-steps", 1]):
        options = ("--attribute-field", "mood", "--strength-field", "hwo", *more)
        outcome = train(rows.parent / "out", *options, data=rows)
        assert outcome.code == 3, outcome.err
        assert "no row has a strength `hwo`" in outcome.err
        assert "Did you mean how?" in outcome.err


def test_check_without_weights(braces: Any, model_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Counts, strengths and two examples, as JSON and as text; nothing is written."""
    folder = tmp_path / "no-weights"
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").unlink()
    args = ("train", "--model", folder, "--data", rows, "--eval-data", rows, "--max-length", 20, "--check")
    args += ("--columns", "attribute=mood,strength=how,prompt=prompt,completion=completion")
    before = sorted(tmp_path.rglob("*"))
    found = braces(*args, "--format", "json").json
    assert (found["data"]["rows"], found["data"]["attributes"]["neutral"]) == (30, 10)
    assert found["data"]["strengths"]["negative"] == {"least": -1.0, "mean": -1.0, "most": -1.0}
    assert found["eval_data"]["truncated"] > 0
    outcome = braces(*args)
    assert outcome.code == 0, outcome.err
    assert "[[ " in outcome.out
    assert "</s>]]" in outcome.out
    assert "attributes and their strengths" in outcome.out
    assert sorted(tmp_path.rglob("*")) == before


# Options, exit code and a part of the message; None removes an option. Rows and settings by themselves are tested in
# tests/data and tests/training/test_settings.py.
BAD_INPUT: dict[str, tuple[dict[str, str | None], int, str]] = {
    "missing file": ({"data": "none.jsonl"}, 3, "no such file"),
    "mixed keys": ({"data": "mixed.jsonl"}, 3, "mixed.jsonl:3: this row is prompt/completion, those before it are"),
    "long prompts": ({"data": "pairs.jsonl", "max-length": "4"}, 3, "no row has a token to score"),
    "attribute column": ({"attribute-field": "mood"}, 3, "rows.jsonl:1: the row has no `mood`"),
    "unknown attribute": ({"data": "mood.jsonl", "attribute-field": "mood"}, 3, "unknown attribute `purple`"),
    "no chat template": ({"data": "chats.jsonl"}, 3, "chats.jsonl:1: the tokenizer has no chat template"),
    "evaluation rows": ({"eval-data": "broken.jsonl"}, 3, "broken.jsonl:2"),
    "hub set": ({"data": "someone/nothing", "streaming": ""}, 3, "hub cannot be reached for the data"),
    "hub model": ({"model": "meta-llama/Llama-2-7b-hf"}, 4, "hub cannot be reached"),
    "no model": ({"model": "./nowhere"}, 4, "no such model folder"),
    "no config": ({"model": "."}, 4, "has no config.json"),
    "adapter as model": ({"model": "{adapter}"}, 4, "this is an adapter, not a model"),
    "rank": ({"rank": "33"}, 2, "rank 33 does not fit hidden size 32"),
    "rate": ({"lr": "nan"}, 2, "more than 0"),
    "device": ({"device": "tpu"}, 2, "device `tpu` is not available"),
    "unknown option": ({"rnk": "3"}, 2, "No such option"),
    "Trainer's option": ({"learning-rate": "3"}, 2, "No such option: --learning-rate (here it is --lr)"),
    "Trainer's key": ({"config": "trainer.yaml"}, 2, "unknown key `num_train_epochs`\nDid you mean epochs"),
    "config file": ({"config": "torn.yaml"}, 2, "torn.yaml:2: not YAML"),
    "full folder": ({"output-dir": "{adapter}"}, 2, "not empty"),
    "file as folder": ({"output-dir": "rows.jsonl"}, 2, "the output folder is a file"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(braces, model_dir, adapter_dir, tmp_path, monkeypatch, name):
    """Exit code and two lines, as text and as JSON; nothing is written."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text\n')
    (folder / "trainer.yaml").write_text("num_train_epochs: 2\n")
    (folder / "torn.yaml").write_text("rank: 4\n]\n")
    for file, rows in {
        "rows": [{"text": "the film is good"}] * 3,
        "mixed": [{"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"}],
        "pairs": [{"prompt": "the film is good", "completion": " and sad"}],
        "mood": [{"text": "a", "mood": "positive"}, {"text": "a", "mood": "purple"}],
        "chats": [{"messages": CHAT}],
    }.items():
        write_rows(folder / f"{file}.jsonl", rows)
    monkeypatch.chdir(folder)
    options, code, message = BAD_INPUT[name]
    given = {"model": str(model_dir), "data": "rows.jsonl", "output-dir": "out", "max-steps": "2", **options}
    before = sorted(folder.rglob("*"))
    words = [(f"--{key}", value.format(adapter=adapter_dir)) for key, value in given.items() if value is not None]
    args = [word for pair in words for word in pair if word]
    outcome = braces("train", *args)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert outcome.out == ""
    assert sorted(folder.rglob("*")) == before
    assert braces("train", *args, "--format", "json").json["error"]["code"] == code
