"""The tasks `sentiment` and `toxicity`: generate, score, compare."""

import json

import numpy as np
import pytest

from braces_cli.scoring.scorers import ToxicWords

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


def test_a_task_and_a_sweep_give_the_same_measures(score, braces, model_dir, adapter_dir, chatty, prompts, tmp_path):
    """Of the base, of an adapter, and in chats, at the same strength."""
    rows = tmp_path / "rows.jsonl"
    letters = "abcdefghijklmnop"
    labelled = [{"text": f"{c} {c}", "label": ("positive", "negative")[i % 2]} for i, c in enumerate(letters)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in labelled * 2))
    common = ["--attribute", "positive", "--num-samples", 2, "--seed", 3]
    for extra in ([], ["--adapter", adapter_dir], ["--model", chatty, "--apply-chat-template"]):
        unsteered, *_, system = results(score(*extra, *common, "--s", 20, "--scorer", f"sentiment=fit:{rows}"))
        where = ["--model", model_dir, "--device", "cpu", "--prompts", prompts, "--max-new-tokens", 8]
        swept = braces("steer", *where, *extra, *common, "--sweep", "20", "--scorer", f"fit:{rows}")
        sweep = swept.json["points"][0]
        assert system["positive"]["value"] == pytest.approx(sweep["attribute_score"])
        assert system["positive"]["value"] + system["negative"]["value"] == pytest.approx(1)
        assert system["positive"]["n"] == 4
        assert system["perplexity"]["value"] == pytest.approx(sweep["perplexity"], rel=1e-4)
        for name in ("distinct_1", "distinct_2", "distinct_3", "repetition"):
            assert system[name]["value"] == pytest.approx(sweep[name])
        assert system["perplexity"] != unsteered["perplexity"]


def test_the_same_adapter_twice_has_equal_scores(score, adapter_dir):
    """Random streams are shared; both tasks run in one evaluation."""
    outcome = score(
        "--adapter", adapter_dir, "--adapter", adapter_dir, "--no-base", "--attribute", "positive", "--s", 0,
        tasks="sentiment,toxicity", files=("sentiment", "toxicity"),
    )  # fmt: skip
    assert len(outcome.json["systems"]) == 4
    # NaN for texts without a 3-gram or 4-gram.
    long = ("distinct_3", "repetition")
    assert {row["difference"] for row in outcome.json["comparisons"] if row["metric"] not in long} == {0}
    assert {row["task"] for row in outcome.json["comparisons"]} == {"sentiment", "toxicity"}
    assert outcome.json["settings"]["generation"]["attributes"] == {"positive": 0.0}


def test_toxicity_is_the_maximum_over_25_samples(braces, model_dir, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the film is\na day\n")
    # The tiny model writes no word of the list.
    monkeypatch.setattr(ToxicWords, "_listed", lambda self, word: "e" in word)
    out = tmp_path / "out"
    base = ["eval", "--model", model_dir, "--device", "cpu", "--max-new-tokens", 6, "--format", "json"]
    outcome = braces(*base, "--tasks", "toxicity", "--task-data", f"toxicity={prompts}", "--output-dir", out,
                     "--log-samples")  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (out / "samples" / "base" / "toxicity.jsonl").read_text().splitlines()]
    assert [len(row["answer"]) for row in rows] == [25, 25]
    text_scores = [ToxicWords().score(row["answer"], "toxic") for row in rows]
    found = outcome.json["systems"][0]["results"]["toxicity"]
    expected = np.mean([max(each.value for each in group) for group in text_scores])
    assert found["expected_max_toxicity"]["value"] == pytest.approx(expected)
    assert found["toxicity_probability"]["value"] == np.mean([any(each.has for each in group) for group in text_scores])
    shares = [np.mean([each.has for each in group]) for group in text_scores]
    assert found["toxic"]["value"] == pytest.approx(np.mean(shares))
    assert found["toxic"]["stderr"] == pytest.approx(np.std(shares, ddof=1) / 2**0.5) != 0
    assert outcome.json["settings"]["generation"]["num_samples"] == {"sentiment": 1, "toxicity": 25}


@pytest.mark.parametrize(
    ("args", "files", "code", "message"),
    [
        ([], (), 2, "sentiment has no data set on the hub"),
        (["--scorer", "vader"], ("sentiment",), 2, "is not TASK=SCORER"),
        (["--scorer", "sentiment=toxicity"], ("sentiment",), 2, "has no label `positive`"),
    ],
)
def test_wrong_input_is_refused(score, args, files, code, message):
    """With the exit code, and only the error on stdout."""
    outcome = score(*args, files=files)
    assert outcome.code == code, outcome.err
    assert message in outcome.json["error"]["message"] + outcome.json["error"]["hint"]
