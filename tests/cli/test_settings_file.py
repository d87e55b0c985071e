"""`settings.yaml` in an output folder repeats the run with `--config`, or tells what differs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

MOODS = "train --data moods.jsonl --max-steps 2"
# Command, a file of which a second run has equal bytes, and the file of settings.
RUNS = {
    "train": f"{MOODS} --attribute-field mood --strength-field how; adapter_model.safetensors; settings.yaml",
    "lora": f"{MOODS} --method lora --rank 2; adapter_model.safetensors; settings.yaml",
    "eval": (
        "eval --adapter adapter --tasks perplexity --task-data perplexity=moods.jsonl --no-base; "
        "results.json; settings.yaml"
    ),
    "attr-build": (
        "attr-build --attribute positive --attribute toxic --adapter adapter; toxic.safetensors; toxic.settings.yaml"
    ),
    "merge": "merge --adapter adapter --attribute positive --s 2; model.safetensors; settings.yaml",
    "steer": (
        "steer --prompts prompts.txt --attribute positive --s 2 --max-new-tokens 4 --no-apply-chat-template; "
        "texts; texts.settings.yaml"
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_second_run_has_equal_bytes_or_a_message(name, braces, mood_rows, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "base")
    Path("prompts.txt").write_text("the film\nthe café\n", encoding="utf-8")
    words, made, settings = RUNS[name].split("; ")

    def run(folder: str, command: str, *args: Any) -> str:
        place = ["--output", f"{folder}/texts"] if command == "steer" else ["--output-dir", folder]
        done = braces(command, *args, *place)
        assert done.code == 0, done.err
        return done.err

    if "--adapter" in words:
        run("adapter", *RUNS["train"].partition(";")[0].split(), "--model", "base")
    seed = ["--seed", 3] if name in ("train", "lora", "steer", "eval") else []
    run("one", *words.split(), "--model", "base", *seed)
    one, two = tmp_path / "one", tmp_path / "two"
    assert "had" not in run("two", name.replace("lora", "train"), "--config", one / settings)
    assert (one / made).read_bytes() == (two / made).read_bytes()
    written = yaml.safe_load((one / settings).read_text(encoding="utf-8"))
    assert written.get("seed") == (3 if seed else None)
    assert name != "attr-build" or sorted(path.name for path in two.iterdir()) == [made, settings]  # toxic alone
    if name == "train":
        written["made_with"] |= {"torch": "1.0"}
        (one / settings).write_text(yaml.safe_dump(written), encoding="utf-8")
        assert "torch 1.0, now" in run("three", "train", "--config", one / settings)
