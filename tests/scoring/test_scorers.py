"""Scorers on plain texts, excluded words, errors; distinct-n and repetition against numbers computed by hand."""

import json
import math
import shutil

import pytest
import torch

from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.models.tokenize import encode, encode_answer
from braces_cli.scoring import scorers
from braces_cli.scoring.likelihood import likelihoods


@pytest.mark.parametrize(
    ("name", "label", "text", "has"),
    [
        ("vader", "positive", "What a wonderful day, I love it!", True),
        ("vader", "negative", "It was not good.", True),
        ("vader", "positive", "The train leaves at nine.", False),
        ("vader", "negative", "The train leaves at nine.", False),
        ("toxicity", "toxic", "You idiot.", True),
        ("toxicity", "toxic", "Idiot's guide", True),
        ("toxicity", "toxic", "Bullshitting again", True),
        ("toxicity", "toxic", "Drop\ndead, he said", True),
        ("toxicity", "toxic", "He would not drop it, and fell dead", False),
        ("toxicity", "toxic", "The classic grass of Scunthorpe, assessed", False),
        ("toxicity", "toxic", "", False),
    ],
)
def test_lexicon_scorers(name, label, text, has):
    """On clear texts, some of which have substrings of listed words."""
    assert scorers.scorer(name).score([text], label)[0].has is has


def test_excluded_words_do_not_count():
    """In any case and inside phrases; other words count."""
    text = "A WONDERFUL evening"
    assert scorers.scorer("vader").score([text], "positive")[0].has
    assert not scorers.scorer("vader", exclude=["Wonderful evening"]).score([text], "positive")[0].has
    assert scorers.scorer("vader", exclude=["wonderful"]).score(["I love it"], "positive")[0].has
    assert not scorers.scorer("toxicity", exclude=["fucking"]).score(["fucking"], "toxic")[0].has
    assert scorers.scorer("toxicity", exclude=["fucking"]).score(["fuck"], "toxic")[0].has


def test_unknown_scorers(tmp_path):
    """A near miss, a folder without a classifier, and a score that is not a number."""
    with pytest.raises(ConfigError, match="Did you mean vader"):
        scorers.scorer("vaider")
    with pytest.raises(ModelError, match="cannot load the classifier"):
        scorers.scorer(str(tmp_path))
    with pytest.raises(BracesError, match="gave nan for text 1"):
        scorers.checked("mine", [0.5, float("nan")])


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A tiny sequence classifier with random weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.conftest import tiny_tokenizer

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=96, pad_token_id=1, id2label=names, label2id={"NEGATIVE": 0, "POSITIVE": 1}, **sizes
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_hugging_face_classifier(hub_folder, model_dir):
    """The likeliest label counts, batches have no effect; a base model and excluded words are refused."""
    loaded = scorers.scorer(str(hub_folder))
    label = scorers.label_of("positive", loaded)
    assert label == "POSITIVE"
    texts = ["the film is good", "a day", "the end of the old town"] * 20
    yes, no = loaded.score(texts, "POSITIVE"), loaded.score(texts, "NEGATIVE")
    assert all(a.has != b.has and abs(a.value + b.value - 1) < 1e-5 for a, b in zip(yes, no, strict=True))
    alone = [loaded.score([text], "POSITIVE")[0].value for text in texts[:3]]
    assert [each.value for each in yes[:3]] == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ModelError, match="no trained head"):
        scorers.scorer(str(model_dir))
    with pytest.raises(ConfigError, match="reads whole texts"):
        scorers.scorer(str(hub_folder), exclude=["good"])


def test_a_classifier_without_a_padding_token(hub_folder, tmp_path):
    """Texts of different lengths in a batch have the scores of each text alone."""
    folder = tmp_path / "classifier"
    shutil.copytree(hub_folder, folder)
    for name, key in (("tokenizer_config.json", "pad_token"), ("config.json", "pad_token_id")):
        content = json.loads((folder / name).read_text())
        assert content.pop(key) is not None
        (folder / name).write_text(json.dumps(content))
    loaded = scorers.scorer(str(folder))
    texts = ["the film is good", "a day", "the end of the old town"]
    alone = [loaded.score([text], "POSITIVE")[0].value for text in texts]
    assert [each.value for each in loaded.score(texts, "POSITIVE")] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("groups", "width", "expected"),
    [
        ([["a b a b"]], 1, 2 / 4),
        ([["a b a b"]], 2, 2 / 3),
        ([["A b.", "a B!"]], 1, 4 / 6),  # a, b, ., ! of six pieces; case does not matter
        ([["a b", "a b"], ["c d"]], 2, (1 / 2 + 1) / 2),  # mean over prompts
        ([["a", ""], ["c d"]], 2, 1.0),  # nothing to count in the first
        ([["don't stop"]], 1, 1.0),
    ],
)
def test_distinct(groups, width, expected):
    """Different n-grams over all n-grams."""
    assert scorers.distinct(groups, width) == pytest.approx(expected)


def test_repetition():
    """A text without a 4-gram is left out."""
    assert scorers.repetition(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert scorers.repetition(["a b c d a b c d", "x y z w", "x"]) == pytest.approx(1 / 10)
    assert math.isnan(scorers.repetition(["a b"]))
    assert math.isnan(scorers.distinct([[""]], 1))


TEXTS = ["a happy day in the old town", "is sad", ""]


@pytest.mark.parametrize("folder", ["model_dir", "chatty"])
def test_a_rating_is_the_expectation_over_the_answers(folder, request):
    """Against the likelihoods of the three answers written out, whatever the batch."""
    judge = scorers.Judge(f"judge:{request.getfixturevalue(folder)}")
    prompts = ["the film", "", "the end"]
    found = judge.rate(list(zip(prompts, TEXTS, strict=True)), "very_positive")
    base = judge._base
    for name, question in scorers._QUESTIONS.items():
        asked = question.format(label="very positive")
        for prompt, text, rating in zip(prompts, TEXTS, found, strict=True):
            whole = scorers._TEMPLATE.format(
                prompt=f"Prompt: {prompt}\n\n" if prompt else "", text=text, question=asked
            )
            if folder == "chatty":
                examples = [encode_answer(base.tokenizer, whole, answer) for answer in "012"]
            else:
                examples = [encode(base.tokenizer, whole, f" {answer}") for answer in "012"]
            if max(len(each.ids) for each in examples) > 128:
                continue  # cut to the context of the tiny model
            nll = [each.nll for each in likelihoods(base.model, examples, base.tokenizer.pad_token_id, 3)]
            chances = (-torch.tensor(nll)).softmax(dim=0)
            assert getattr(rating, name) == pytest.approx(float(chances[1] + 2 * chances[2]), abs=1e-4)
    alone = [judge.rate([(prompt, text)], "very_positive")[0] for prompt, text in zip(prompts, TEXTS, strict=True)]
    assert [each.concept for each in alone] == pytest.approx([each.concept for each in found], abs=1e-5)
    # As a scorer it rates the text without its prompt.
    assert judge.score(TEXTS[1:2], "very_positive")[0].value == pytest.approx(found[1].concept / 2, abs=1e-5)


def test_a_judge_is_a_scorer_of_any_label(model_dir):
    """The overall rating is a harmonic mean."""
    assert scorers.Rating(2, 1, 1).overall == pytest.approx(1.2)
    assert scorers.Rating(2, 0, 1).overall == 0
    judge = scorers.scorer(f"judge:{model_dir}")
    assert scorers.label_of("cheerful", judge) == "cheerful"
    assert scorers.label_of("cheerful", judge, "merry") == "merry"
    with pytest.raises(ConfigError, match="reads whole texts"):
        scorers.scorer(f"judge:{model_dir}", exclude=["good"])
    with pytest.raises(ModelError, match="nowhere"):
        scorers.scorer("judge:nowhere")
