"""`braces eval` from the command line."""

import json

import pytest

POPQA = [{"question": f"what is {i}?", "possible_answers": '["a"]'} for i in range(4)]


@pytest.fixture
def popqa(tmp_path):
    path = tmp_path / "popqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in POPQA))
    return path


def test_outputs_of_an_evaluation(braces, model_dir, adapter_dir, popqa, tmp_path):
    """Table, Markdown page, log and JSON of one run, with the same adapter twice; then resumed."""
    out, text = tmp_path / "out", tmp_path / "t.txt"
    text.write_text("the film is good\nand the end is sad\n" * 6)
    outcome = braces(
        "eval", "--adapter", adapter_dir, "--adapter", adapter_dir, "--tasks", "popqa,perplexity",
        "--task-data", f"popqa={popqa}", "--task-data", f"perplexity={text}", "--output-dir", out, "--log-samples",
        "--device", "cpu", "--fail-under", "perplexity:token_perplexity=1e9",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "adapters among themselves" in outcome.out
    result = json.loads((out / "results.json").read_text())
    assert [row["reached"] for row in result["fail_under"]] == [True, True]
    twice = [c for c in result["comparisons"] if c["from"] != "base" and c["metric"] not in ("empty", "truncated")]
    assert {(c["difference"], c["p_value"], c["significant"]) for c in twice} == {(0, 1, False)}
    against = [c for c in result["comparisons"] if (c["from"], c["metric"]) == ("base", "token_perplexity")]
    assert len(against) == 2
    assert all(c["difference"] != 0 and c["p_value"] < 1 for c in against)
    page = (out / "results.md").read_text()
    for expected in (
        result["systems"][1]["sha256"][:12],
        "limit: all documents",
        "seeds: python 0",
        "torch ",
        "| popqa |",
        "| no difference |",
    ):
        assert expected in page
    assert len((out / "samples" / "base" / "popqa.jsonl").read_text().splitlines()) == 4
    assert braces("eval", "--model", model_dir, "--tasks", "popqa", "--output-dir", out).code == 2
    again = braces(
        "eval", "--adapter", adapter_dir, "--adapter", adapter_dir, "--tasks", "popqa,perplexity", "--format", "json",
        "--task-data", f"popqa={popqa}", "--task-data", f"perplexity={text}", "--output-dir", out, "--log-samples",
        "--resume",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert again.json["systems"] == result["systems"]


def test_a_missed_threshold_gives_exit_code_5_and_the_result(braces, model_dir, popqa, tmp_path):
    args = ("eval", "--model", model_dir, "--tasks", "popqa", "--task-data", f"popqa={popqa}", "--device", "cpu")
    out = tmp_path / "out"
    missed = braces(*args, "--fail-under", "popqa:acc=1.1", "--format", "json", "--output-dir", out)
    assert missed.code == 5
    assert missed.json["fail_under"][0]["reached"] is False
    assert json.loads((out / "results.json").read_text()) == missed.json
    assert "popqa acc is" in missed.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--fail-under", "popqa:f1=0.5"), "no metric `f1`"),
        (("--fail-under", "triviaqa:acc=0.5"), "not evaluated"),
        (("--fail-under", "popqa"), "TASK:METRIC=VALUE"),
        (("--resume",), "--output-dir"),
    ],
)
def test_a_wrong_call_fails_before_the_model_is_loaded(braces, popqa, options, words):
    outcome = braces("eval", "--model", "/nowhere", "--tasks", "popqa", "--task-data", f"popqa={popqa}", *options)
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.out == ""
