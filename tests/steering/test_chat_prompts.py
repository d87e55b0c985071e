"""Prompts as turns of a chat."""

from __future__ import annotations

import json


def test_chat_templates_are_used_as_asked_and_else_as_in_training(braces, chatty, model_dir, adapter_dir):
    """One start token, not two; the row keeps the user's words."""
    base = ["steer", "--device", "cpu", "--max-new-tokens", 8, "--format", "json"]

    def text(*args, prompt="a day"):
        outcome = braces(*base, *args, "--prompt", prompt)
        assert outcome.code == 0, outcome.err
        assert outcome.lines[0]["prompt"] == prompt
        return outcome.lines[0]["text"]

    spelt = text("--model", chatty, prompt="user: a day\nassistant:")
    assert text("--model", chatty, "--apply-chat-template") == spelt != text("--model", chatty)
    config = adapter_dir / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"training": {"chat_template": True}}))
    adapted = ["--model", chatty, "--adapter", adapter_dir]
    bare = text(*adapted, "--no-apply-chat-template", prompt="user: a day\nassistant:")
    assert text(*adapted) == bare != text(*adapted, "--no-apply-chat-template")
    refused = braces(*base, "--model", model_dir, "--apply-chat-template", "--prompt", "a")
    assert refused.code == 2
    assert "no chat template" in refused.err
