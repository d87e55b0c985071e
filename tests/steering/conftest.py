"""Prompts and calls of `braces steer` for the tests of steering."""

import pytest

LINES = ["the film is", "a day", "the end of the old town", "happy", "a good day and"]
STEERED = ("--attribute", "positive", "--s", "20")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture
def steer(braces, model_dir, prompts):
    def call(*args, stdin="", given=True):
        source = ["--prompts", prompts] if given else []
        base = ["--model", model_dir, "--device", "cpu", "--max-new-tokens", 8, "--format", "json"]
        return braces("steer", *base, *source, *args, stdin=stdin)

    return call
