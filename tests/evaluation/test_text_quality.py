"""The tasks `sentiment` and `toxicity`: generate, score, compare."""

from __future__ import annotations

import json
import shutil

import pytest

PROMPTS = ["the film is", "a day", "the end of the old town", "a happy day in"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": {"text": prompt}}) + "\n" for prompt in PROMPTS))
    return file


@pytest.fixture
def score(braces, model_dir, prompts):
    def call(*args, tasks="sentiment", files=("sentiment",)):
        data = [part for name in files for part in ("--task-data", f"{name}={prompts}")]
        base = ["--model", model_dir, "--device", "cpu", "--tasks", tasks, *data, "--max-new-tokens", 8]
        return braces("eval", *base, "--format", "json", *args)

    return call


def results(outcome, task="sentiment"):
    assert outcome.code == 0, outcome.err
    return [system["results"][task] for system in outcome.json["systems"]]


def test_what_is_written_is_scored_as_steer_and_its_sweep_do(score, braces, model_dir, adapter_dir, prompts, tmp_path):
    """The same texts, shares, perplexity and diversity as `steer --sweep` at that strength; of base and adapter."""
    rows = tmp_path / "rows.jsonl"
    letters = "abcdefghijklmnop"
    labelled = [{"text": f"{c} {c}", "label": ("positive", "negative")[i % 2]} for i, c in enumerate(letters)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in labelled * 2))
    asked = ["--attribute", "positive", "--num-samples", 2, "--seed", 3]
    for extra in ([], ["--adapter", adapter_dir]):
        unsteered, *_, system = results(score(*extra, *asked, "--s", 20, "--scorer", f"sentiment=fit:{rows}"))
        where = ["--model", model_dir, "--device", "cpu", "--prompts", prompts, "--max-new-tokens", 8]
        swept = braces("steer", *where, *extra, *asked, "--sweep", "20", "--scorer", f"fit:{rows}")
        sweep = swept.json["points"][0]
        assert system["positive"]["value"] == pytest.approx(sweep["attribute_score"])
        assert system["positive"]["value"] + system["negative"]["value"] == pytest.approx(1)
        assert system["positive"]["n"] == 4
        assert system["perplexity"]["value"] == pytest.approx(sweep["perplexity"], rel=1e-4)
        for name in ("distinct_1", "distinct_2", "distinct_3", "repetition"):
            assert system[name]["value"] == pytest.approx(sweep[name])
        assert system["perplexity"] != unsteered["perplexity"]


def test_the_same_adapter_twice_is_no_difference(score, adapter_dir):
    """Random streams are shared, so nothing differs; both tasks in one run; the settings say how it was written."""
    outcome = score(
        "--adapter", adapter_dir, "--adapter", adapter_dir, "--no-base", "--attribute", "positive", "--s", 0,
        tasks="sentiment,toxicity", files=("sentiment", "toxicity"),
    )  # fmt: skip
    assert len(outcome.json["systems"]) == 4
    # Texts too short for a single 3-gram or 4-gram have neither of these.
    long = ("distinct_3", "repetition")
    assert {row["difference"] for row in outcome.json["comparisons"] if row["metric"] not in long} == {0}
    assert {row["task"] for row in outcome.json["comparisons"]} == {"sentiment", "toxicity"}
    assert outcome.json["settings"]["generation"]["attributes"] == {"positive": 0.0}


@pytest.mark.parametrize(
    ("args", "files", "code", "message"),
    [
        ([], (), 2, "sentiment has no data set on the hub"),
        (["--scorer", "vader"], ("sentiment",), 2, "is not TASK=SCORER"),
        (["--scorer", "sentiment=vaider"], ("sentiment",), 2, "Did you mean vader?"),
        (["--scorer", "sentiment=toxicity"], ("sentiment",), 2, "has no label `positive`"),
        (["--attribute", "positve"], ("sentiment",), 2, "Did you mean positive"),
        (["--attribute", "positive", "--s", "1", "--s", "2"], ("sentiment",), 2, "2 strengths for 1 attributes"),
    ],
)
def test_bad_input(score, args, files, code, message):
    """The right code, and nothing on stdout but the error."""
    outcome = score(*args, files=files)
    assert outcome.code == code, outcome.err
    assert message in outcome.json["error"]["message"] + outcome.json["error"]["hint"]


def test_prompts_go_into_the_chat_template(score, braces, model_dir, prompts, tmp_path):
    """With the template the prompt is the user's turn: the same texts as `steer` generates, and others without it."""
    from transformers import AutoTokenizer

    folder = tmp_path / "chat"
    shutil.copytree(model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"
    tokenizer.save_pretrained(folder)
    answers, recorded = {}, {}
    for flag in ("--apply-chat-template", "--no-apply-chat-template"):
        out = tmp_path / flag
        outcome = score("--model", folder, "--seed", 3, flag, "--output-dir", out, "--log-samples")
        assert outcome.code == 0, outcome.err
        recorded[flag] = outcome.json["settings"]["apply_chat_template"]
        rows = (out / "samples" / "base" / "sentiment.jsonl").read_text().splitlines()
        answers[flag] = [json.loads(row)["answer"] for row in rows]
        steered = braces(
            "steer", "--model", folder, "--device", "cpu", "--prompts", prompts, "--max-new-tokens", 8, "--seed", 3,
            flag, "--format", "json",
        )  # fmt: skip
        assert answers[flag] == [row["text"] for row in steered.lines], steered.err
    assert recorded == {"--apply-chat-template": True, "--no-apply-chat-template": False}
    assert answers["--apply-chat-template"] != answers["--no-apply-chat-template"]
