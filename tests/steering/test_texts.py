"""The generation loop: reading ahead, unsteered texts, stop strings, chats, rows with attributes."""

import json
import re
from itertools import count, islice

import pytest

from braces_cli.core.options import Sampling
from braces_cli.steering.texts import generate_rows, text_requests
from tests.steering.conftest import LINES, STEERED


def test_prompts_are_read_one_batch_ahead(session):
    """An endless source of prompts works."""
    read = []
    endless = (read.append(k) or f"prompt {k}" for k in count())
    rows = generate_rows(session, text_requests(endless, 2), Sampling(2), batch_size=4)
    assert [row["prompt"] for row in islice(rows, 5)] == ["prompt 0"] * 2 + ["prompt 1"] * 2 + ["prompt 2"]
    assert len(read) <= 5


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_unsteered_text_is_that_without_attributes(steer, adapter_dir, with_adapter):
    """`--show-unsteered` does not change `text`; at s = 0 both are equal."""
    extra = ["--adapter", adapter_dir] if with_adapter else []
    plain, moved = steer(*extra).lines, steer(*extra, *STEERED).lines
    both = steer(*extra, *STEERED, "--show-unsteered").lines
    assert [row["text"] for row in both] == [row["text"] for row in moved]
    assert [row["unsteered"] for row in both] == [row["text"] for row in plain]
    assert any(row["unsteered"] != row["text"] for row in both)
    zero = steer(*extra, "--attribute", "positive", "--s", 0, "--show-unsteered").lines
    assert all(row["unsteered"] == row["text"] for row in zero)


@pytest.mark.parametrize("scope", ["prompt", "generated"])
def test_scope_gives_the_same_texts_in_batches_alone_and_in_a_conversation(steer, scope):
    """They differ from those of all tokens; with `generated` the first token is that of the base."""
    options = [*STEERED, "--scope", scope, "--temperature", 0]
    batch = [row["text"] for row in steer(*options, "--batch-size", 5, "--show-unsteered").lines]
    assert [row["text"] for row in steer(*options, "--batch-size", 1).lines] == batch
    talk = steer(*options, "--interactive", stdin="\n".join(LINES), given=False).lines
    assert [row["text"] for row in talk] == batch
    whole = steer(*STEERED, "--temperature", 0, "--show-unsteered").lines
    assert batch != [row["text"] for row in whole]
    same = [text[:1] == row["unsteered"][:1] for text, row in zip(batch, whole, strict=True)]
    assert all(same) == (scope == "generated")


def set_config(adapter_dir, **values):
    """Replace keys of an adapter's config."""
    config = adapter_dir / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def test_a_stop_string_ends_texts(steer, adapter_dir):
    """Of the command line, and the text that ends a turn of the adapter."""
    adapted = steer("--adapter", adapter_dir).lines
    end = adapted[0]["text"][2:6]
    set_config(adapter_dir, end_of_turn=[end])
    cut = steer("--adapter", adapter_dir).lines
    assert [row["text"] for row in cut] == [row["text"].split(end)[0] for row in adapted]
    assert len(cut[0]["text"]) == 2
    whole, cut = steer().lines, steer("--stop", "e", "--stop", "a").lines
    assert [row["text"] for row in cut] == [re.split("[ea]", row["text"])[0] for row in whole]


def test_the_chat_template_is_applied_on_request_or_as_in_training(braces, chatty, model_dir, adapter_dir):
    """With one start token; the row has the prompt without the template."""
    base = ["steer", "--device", "cpu", "--max-new-tokens", 8, "--format", "json"]

    def text(*args, prompt="a day"):
        outcome = braces(*base, *args, "--prompt", prompt)
        assert outcome.code == 0, outcome.err
        assert outcome.lines[0]["prompt"] == prompt
        return outcome.lines[0]["text"]

    spelt = text("--model", chatty, prompt="user: a day\nassistant:")
    assert text("--model", chatty, "--apply-chat-template") == spelt != text("--model", chatty)
    set_config(adapter_dir, training={"chat_template": True})
    adapted = ["--model", chatty, "--adapter", adapter_dir]
    bare = text(*adapted, "--no-apply-chat-template", prompt="user: a day\nassistant:")
    assert text(*adapted) == bare != text(*adapted, "--no-apply-chat-template")
    refused = braces(*base, "--model", model_dir, "--apply-chat-template", "--prompt", "a")
    assert refused.code == 2
    assert "no chat template" in refused.err
    misfit = braces(*base, "--model", model_dir, "--adapter", adapter_dir, "--prompt", "a")
    assert misfit.code == 4
    assert "--no-apply-chat-template" in misfit.err


NAMES = ("positive", "toxic", "formal", "sad")
WORDS = ("the film is", "a day", "the end of the old town", "happy", "a good day and", "in the old", "is sad")


@pytest.fixture
def rows(tmp_path):
    """64 rows with four attributes at nine strengths; one row with two attributes, one with {} and one without."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"{WORDS[k % 7]} {chr(97 + k % 26)}", "attributes": {NAMES[k % 4]: 5.0 * (k % 9 - 4)}}
        for k in range(64)
    ]
    lines[5]["attributes"] = {"positive": 9, "sad": -9}
    lines[6]["attributes"] = {}
    del lines[7]["attributes"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def steered_rows(braces, model_dir, rows):
    def call(*args):
        base = ["--model", model_dir, "--device", "cpu", "--max-new-tokens", 6, "--format", "json"]
        outcome = braces("steer", *base, "--prompts", rows, "--attribute", "formal", "--s", 3, *args)
        assert outcome.code == 0, outcome.err
        return outcome

    return call


@pytest.mark.parametrize("trained", [False, True])
def test_a_mixed_batch_gives_the_texts_of_each_row_alone(steered_rows, adapter_dir, trained):
    """A row without `attributes` has those of the command line."""
    adapter = ["--adapter", adapter_dir] if trained else []
    mixed = steered_rows("--batch-size", 64, *adapter).lines
    assert mixed == steered_rows("--batch-size", 1, *adapter).lines
    assert mixed[5]["attributes"] == {"positive": 9.0, "sad": -9.0}
    assert mixed[6]["attributes"] == {}
    assert mixed[7]["attributes"] == {"formal": 3.0}
    both = steered_rows("--batch-size", 64, "--show-unsteered", *adapter).lines
    assert [row["text"] for row in both] == [row["text"] for row in mixed]
    moved = {k for k, row in enumerate(both) if row["unsteered"] != row["text"]}
    at_zero = {k for k, row in enumerate(mixed) if not any(row["attributes"].values())}
    assert not moved & at_zero
    assert len(moved) > 30
    assert 6 in at_zero
    assert len(at_zero) > 5


@pytest.mark.parametrize(
    ("attributes", "code", "message"),
    [
        ({"positve": 1}, 2, "unknown attribute `positve`"),
        (["positive"], 3, "does not map names to strengths"),
        ({"positive": "much"}, 3, "does not map names to strengths"),
        ({"positive": True}, 3, "does not map names to strengths"),
    ],
)
def test_an_error_in_the_last_row_comes_before_the_first_text(braces, model_dir, tmp_path, attributes, code, message):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "a day"}, {"prompt": "happy", "attributes": attributes}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = ["--model", model_dir, "--device", "cpu", "--batch-size", 1, "--format", "json", "--prompts", path]
    outcome = braces("steer", *base)
    assert outcome.code == code
    assert message in outcome.json["error"]["message"]
    assert code == 2 or outcome.json["error"]["where"] == f"{path}:2"


def test_a_sweep_refuses_rows_with_attributes(braces, model_dir, rows):
    outcome = braces("steer", "--model", model_dir, "--prompts", rows, "--attribute", "positive", "--sweep", "1")
    assert outcome.code == 3
    assert "a row has `attributes`" in outcome.err + outcome.out
