"""A command downloads an adapter from the hub once."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def downloads(adapter_dir, monkeypatch):
    """Names that were downloaded from a fake hub with one adapter, `someone/adapter`."""
    names: list[str] = []

    def download(name, **options):
        names.append(name)
        return str(adapter_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return names


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_an_adapter_is_downloaded_once(braces, downloads, tmp_path, command):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "the film is good"}) + "\n")
    options = {
        "eval": ["--tasks", "perplexity", "--task-data", f"perplexity={texts}"],
        "merge": ["--output-dir", tmp_path / "merged", "--attribute", "positive", "--pad-to-multiple-of", 4],
    }[command]
    outcome = braces(command, "--adapter", "someone/adapter", "--device", "cpu", "--format", "json", *options)
    assert outcome.code == 0, outcome.err
    assert downloads == ["someone/adapter"]
