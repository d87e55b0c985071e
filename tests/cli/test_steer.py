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


def test_attributes_add_up(session):
    """Logits of A + B are those of the summed push; s = 2 of A is A twice."""
    import torch

    from braces_cli.core.attributes.attribute import build_attribute
    from braces_cli.core.attributes.intervention import steered
    from braces_cli.core.method.adapter import attach
    from tests.conftest import open_gates

    good = build_attribute(session, "good", ["good", "happy"])
    old = build_attribute(session, "old", ["old", "town"])
    tokens = torch.tensor([[0, 5, 6, 7]])

    def logits(*terms):
        with steered(session, terms) as pushes, torch.no_grad():
            return session.base.model(tokens).logits, pushes

    for attached in (False, True):
        if attached:
            session.adapter = attach(session.base.model, 4)
            open_gates(session.adapter)
        with torch.no_grad():
            bare = session.base.model(tokens).logits
        both, _ = logits((good, 2.0), (old, -1.0))
        swapped, _ = logits((old, -1.0), (good, 2.0))
        doubled, pushes = logits((good, 1.0), (good, 1.0))
        single, twice = logits((good, 2.0))
        assert torch.allclose(both, swapped, atol=1e-5)
        assert torch.allclose(doubled, single, atol=1e-5)
        assert [p.share for p in pushes] == pytest.approx([p.share for p in twice])
        none, nothing = logits((good, 0.0))
        assert torch.equal(none, bare)
        assert nothing == []
        assert torch.equal(logits()[0], bare)  # and nothing stays behind


def test_without_training_strength_one_is_twelve_percent_of_the_residual(session):
    """In all, over the first half of the layers, by the definition of the scale; where layers are named, there."""
    from braces_cli.core.attributes.attribute import build_attribute
    from braces_cli.core.attributes.intervention import steered

    good = build_attribute(session, "good", ["good", "happy"])
    with steered(session, [(good, 1.0)]) as pushes:
        assert [p.share for p in pushes] == pytest.approx([0.12], rel=1e-4)
    with steered(session, [(good, -2.0)], layers=[1]) as pushes:
        assert [(p.layer, round(p.share, 4)) for p in pushes] == [(1, 0.24)]


def test_steering_with_an_adapter_is_the_papers_formula(session):
    """r_i + s r_c at every layer, against the reference."""
    import torch

    from braces_cli.core.attributes.attribute import build_attribute
    from braces_cli.core.attributes.intervention import steered
    from braces_cli.core.method.adapter import attach
    from braces_cli.core.method.reference import reference
    from tests.conftest import open_gates

    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    good = build_attribute(session, "good", ["good", "happy"])
    tokens = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        with steered(session, [(good, 3.0)]):
            fast = session.base.model(tokens).logits
        with reference(session.adapter, {layer: [(good.state[i], 3.0)] for i, layer in enumerate(good.layers)}):
            slow = session.base.model(tokens).logits
    assert float((fast - slow).abs().max() / slow.abs().max()) < 1e-5


def test_stderr_says_how_strong_the_push_is(steer):
    """And that nothing happens where nothing does."""
    assert "36.0% of the residual stream" in steer("--attribute", "positive", "--s", 3).err
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


def test_the_same_words_give_the_same_state_with_and_without_an_adapter(session):
    """Words go through the bare base."""
    import torch

    from braces_cli.core.attributes.attribute import build_attribute
    from braces_cli.core.method.adapter import attach
    from tests.conftest import open_gates

    before = build_attribute(session, "good", ["good"])
    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    after = build_attribute(session, "good", ["good"])
    assert torch.equal(before.hidden, after.hidden)


def test_pooling_is_the_mean_over_tokens_then_over_words(session):
    """Against one word at a time, without batches; no start token, no padding."""
    import torch

    from braces_cli.core.attributes.attribute import pool_words

    model, tokenizer = session.base.model, session.base.tokenizer
    words = ["good", "town", "sad", "extraordinary"]
    seen = []
    handle = session.ffns[1].keys[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for word in words:
            model(torch.tensor([tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]))
    handle.remove()
    expected = torch.stack([h[0].mean(0) for h in seen]).mean(0)
    assert torch.allclose(pool_words(model, tokenizer, session.ffns, words)[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--attribute", "positve"], 2, "Did you mean positive"),
        (["--attribute", "positive", "--s", "nan"], 2, "no finite number"),
        (["--attribute", "positive", "--s", "inf"], 2, "no finite number"),
        (["--attribute", "positive", "--s", "1", "--s", "2"], 2, "2 strengths for 1 attributes"),
        (["--attribute", "../x"], 2, "cannot name an attribute"),
        (["--attributes", "nowhere"], 2, "no such folder"),
        (["--temperature", "-1"], 2, "out of range"),
        (["--top-p", "0"], 2, "out of range"),
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


def test_a_built_in_list_with_an_opposite_is_one_end_of_an_axis(braces, session, model_dir, tmp_path):
    """positive is minus negative; attr-build without words writes the same; a list without opposite keeps neutral."""
    import torch

    from braces_cli.core.attributes.attribute import build_attribute, find_attribute
    from braces_cli.core.attributes.word_lists import built_in

    one, other = (find_attribute(session, name, None) for name in ("positive", "negative"))
    assert torch.allclose(one.state, -other.state, atol=1e-6)
    ends = [build_attribute(session, name, built_in()[name]).hidden for name in ("positive", "negative")]
    assert torch.allclose(one.state, (ends[0] - ends[1]) / 2, atol=1e-6)
    args = ["attr-build", "--model", model_dir, "--device", "cpu", "--attribute", "positive", "--output-dir", tmp_path]
    assert braces(*args).code == 0
    assert torch.equal(find_attribute(session, "positive", tmp_path).state, one.state)
    angry = find_attribute(session, "angry", None)
    assert torch.equal(angry.reference, build_attribute(session, "mine", ["own"]).reference)
