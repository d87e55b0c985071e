"""`braces steer` and `braces attr-build`: the laws of steering, streams, lookups."""

from __future__ import annotations

import json

import pytest

PROMPTS = ["the film is", "a day", "the end of the old town and the film is"]


@pytest.fixture
def steer(braces, model_dir):
    def call(*args, stdin="", model=True, prompts=PROMPTS):
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        base = ["--model", model_dir, "--device", "cpu"] if model else []
        return braces("steer", *base, *asked, "--max-new-tokens", 12, *args, stdin=stdin)

    return call


def texts(outcome):
    assert outcome.code == 0, outcome.err
    return [row["text"] for row in outcome.lines]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_strength_zero_is_no_attribute_bit_for_bit(steer, adapter_dir, with_adapter):
    """The same tokens at the same seed, with and without an adapter."""
    extra = ["--adapter", adapter_dir] if with_adapter else []
    plain = texts(steer(*extra))
    zero = texts(steer(*extra, "--attribute", "positive", "--s", 0))
    pushed = texts(steer(*extra, "--attribute", "positive", "--s", 40))
    assert plain == zero
    assert plain != pushed


def test_rows_hold_the_keys_of_the_contract(steer):
    """prompt, text, attributes, sample, seed; samples of a prompt stand together."""
    outcome = steer("--num-samples", 2, "--attribute", "positive", "--s", "1.5", "--attribute", "negative", "--s", "-2")
    assert len(outcome.lines) == 6
    first = outcome.lines[1]
    assert set(first) == {"prompt", "text", "attributes", "sample", "seed"}
    assert (first["prompt"], first["sample"]) == (PROMPTS[0], 1)
    assert first["attributes"] == {"positive": 1.5, "negative": -2.0}
    assert outcome.lines[0]["text"] != first["text"]


def test_greedy_text_of_a_batch_equals_one_by_one(steer, adapter_dir):
    """Left padding and the cache leave no trace."""
    args = ["--adapter", adapter_dir, "--attribute", "positive", "--s", 3, "--temperature", 0]
    assert texts(steer(*args, "--batch-size", 1)) == texts(steer(*args, "--batch-size", 3))


def test_a_sampled_text_does_not_depend_on_its_batch(steer):
    """One random stream for each (seed, prompt, sample)."""
    one = texts(steer("--num-samples", 2, "--batch-size", 1))
    assert one == texts(steer("--num-samples", 2, "--batch-size", 4))
    assert one != texts(steer("--num-samples", 2, "--seed", 1))


def test_stderr_says_how_strong_the_push_is(steer):
    """And that nothing happens where nothing does."""
    assert "30.0% of the residual stream" in steer("--attribute", "positive", "--s", 3).err
    assert "nothing is added" in steer("--attribute", "positive", "--s", 0).err
    assert steer("--attribute", "positive", "--s", 3, "--quiet").err == ""


def test_prompts_from_a_file_and_from_a_pipe(steer, tmp_path):
    """Plain lines and JSON Lines, also nested as the prompt sets of the field are."""
    lines = tmp_path / "p.txt"
    lines.write_text("the film is\n\na day\n")
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": {"text": "the film is"}}\n{"prompt": "a day"}\n')
    piped = texts(steer(prompts=[], stdin=lines.read_text()))
    assert len(piped) == 2
    assert piped == texts(steer("--prompts", lines, prompts=[])) == texts(steer("--prompts", rows, prompts=[]))
    assert piped == texts(steer(prompts=[], stdin=rows.read_text()))


def test_built_attributes_are_found_before_the_built_in_ones(braces, steer, model_dir, tmp_path):
    """--attributes DIR first; the file says what it was made of."""
    folder = tmp_path / "attrs"
    build = [
        "attr-build",
        "--model",
        model_dir,
        "--attribute",
        "positive",
        "--words",
        "old, town ,old",
        "--output-dir",
        folder,
    ]
    outcome = braces(*build, "--format", "json")
    assert outcome.json["words"] == ["old", "town"]
    assert (outcome.json["layers"], outcome.json["hidden_size"]) == (2, 32)
    assert outcome.json["path"] == str(folder / "positive.safetensors")
    own = texts(steer("--attribute", "positive", "--s", 30, "--attributes", folder))
    assert own != texts(steer("--attribute", "positive", "--s", 30))
    again = braces(*build)
    assert again.code == 2
    assert "exists already" in again.err
    assert braces(*build, "--overwrite").code == 0
    assert braces(*build[:4], "old", *build[5:]).code == 0  # another name joins the folder
    assert sorted(p.name for p in folder.iterdir()) == ["old.safetensors", "positive.safetensors"]


def test_words_from_a_file_and_from_the_built_in_lists(braces, model_dir, tmp_path):
    """Comments and blank lines are left out; built-in lists have about forty words."""
    words = tmp_path / "w.txt"
    words.write_text("# mine\nhappy\n\n good \n")
    args = ["attr-build", "--model", model_dir, "--output-dir", tmp_path / "a", "--format", "json"]
    assert braces(*args, "--attribute", "mine", "--words-file", words).json["words"] == ["happy", "good"]
    for name in ("positive", "negative", "neutral"):
        assert 35 <= len(braces(*args, "--attribute", name).json["words"]) <= 45


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--attribute", "positve"], 2, "Did you mean positive"),
        (["--attribute", "positive", "--s", "nan"], 2, "is not a number"),
        (["--attribute", "positive", "--s", "inf"], 2, "is not a number"),
        (["--attribute", "positive", "--s", "1", "--s", "2"], 2, "2 strengths for 1 attributes"),
        (["--s", "1"], 2, "Name the attribute with --attribute"),
        (["--attribute", "../x"], 2, "cannot name an attribute"),
        (["--attributes", "nowhere"], 2, "no such folder"),
        (["--temperature", "-1"], 2, "at least 0"),
        (["--top-p", "0"], 2, "more than 0"),
        (["--max-new-tokens", "500"], 2, "500 is too much"),
        (["--adapter", "nowhere"], 4, "no such adapter folder"),
    ],
)
def test_bad_input(steer, args, code, message):
    """Two lines and the right code."""
    outcome = steer(*args)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert outcome.out == ""


def test_unknown_attributes_list_those_known(steer):
    """So that a user sees what can be asked for."""
    assert "Known: angry, casual, fearful" in steer("--attribute", "purple").err


@pytest.mark.parametrize(
    ("stdin", "message"),
    [("", "no prompts"), ('{"prompt": 3}\n', "no `prompt` with text"), ('{"prompt\n', "broken JSON")],
)
def test_bad_pipes_exit_3(steer, stdin, message):
    """With the line."""
    outcome = steer(prompts=[], stdin=stdin)
    assert outcome.code == 3
    assert message in outcome.err


def test_an_adapter_of_another_base_is_refused(braces, session, adapter_dir, tmp_path):
    """Exit code 4, naming the base it needs."""
    from tests.conftest import tiny_model, tiny_tokenizer

    other = tmp_path / "other"
    tiny_model("llama", seed=5, vocab_size=96).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    outcome = braces("steer", "--model", other, "--adapter", adapter_dir, "--prompt", "a")
    assert outcome.code == 4
    assert "trained on another base (same sizes, other weights)" in outcome.err
    assert json.loads((adapter_dir / "adapter_config.json").read_text())["base_model_name_or_path"] in outcome.err


def test_an_attribute_of_another_base_is_refused(braces, model_dir, tmp_path):
    """Exit code 4."""
    from tests.conftest import tiny_model, tiny_tokenizer

    other = tmp_path / "other"
    tiny_model("llama", seed=5, vocab_size=96).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    braces("attr-build", "--model", model_dir, "--attribute", "x", "--words", "good", "--output-dir", tmp_path / "a")
    outcome = braces("steer", "--model", other, "--attribute", "x", "--attributes", tmp_path / "a", "--prompt", "a")
    assert outcome.code == 4
    assert "built for another base" in outcome.err


@pytest.mark.parametrize("option", [["--prompt", "a"], ["--num-samples", "2"], ["--output", "x.jsonl"]])
def test_what_a_conversation_takes_no_part_in(steer, option):
    """Exit 2 before a model is loaded."""
    outcome = steer("--interactive", *option, prompts=[])
    assert outcome.code == 2
    assert "does not go with --interactive" in outcome.err


def test_the_table_of_texts(steer):
    """Every prompt and text, the unsteered one between them, no markup read."""
    outcome = steer("--format", "table", "--show-unsteered", "--attribute", "positive", "--s", 20, prompts=["[red]a"])
    assert "[red]a" in outcome.out
    assert "unsteered" in outcome.out
    assert "positive +20" in outcome.out


@pytest.mark.parametrize(
    "option",
    [
        ["--show-unsteered"],
        ["--output", "x.jsonl"],
        ["--resume"],
        ["--interactive"],
    ],
)
def test_options_that_a_sweep_does_not_take_are_refused(steer, tmp_path, monkeypatch, option):
    """By name, and nothing is written; with --dry-run, too."""
    monkeypatch.chdir(tmp_path)
    for dry_run in ([], ["--dry-run"]):
        outcome = steer("--attribute", "positive", "--sweep", "0", *option, *dry_run)
        assert outcome.code == 2
        assert f"{option[0]}: does not go with --sweep" in outcome.err
    assert list(tmp_path.iterdir()) == []
