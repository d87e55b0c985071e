"""A language model as a judge: ratings are expectations over its three possible answers."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.tokenize import encode
from braces_cli.scoring.judge import _QUESTIONS, _TEMPLATE, Judge, Rating, load_judge
from braces_cli.scoring.likelihood import likelihoods
from braces_cli.scoring.scorers import label_of, scorer

TEXTS = ["a happy day in the old town", "is sad", ""]


@pytest.mark.parametrize("folder", ["model_dir", "chatty"])
def test_a_rating_is_the_expectation_over_the_answers(folder, request):
    """Against the likelihoods of the three answers written out, whatever the batch."""
    judge = load_judge(f"judge:{request.getfixturevalue(folder)}")
    prompts = ["the film", "", "the end"]
    found = judge.rate(prompts, TEXTS, "very_positive")
    base = judge._base
    for question, name in ((0, "concept"), (1, "relevance"), (2, "fluency")):
        asked = list(_QUESTIONS.values())[question].format(label="very positive")
        for prompt, text, rating in zip(prompts, TEXTS, found, strict=True):
            whole = _TEMPLATE.format(prompt=f"Prompt: {prompt}\n\n" if prompt else "", text=text, question=asked)
            if folder == "chatty":
                from braces_cli.core.models.tokenize import encode_answer

                examples = [encode_answer(base.tokenizer, whole, answer) for answer in "012"]
            else:
                examples = [encode(base.tokenizer, whole, f" {answer}") for answer in "012"]
            if max(len(each.ids) for each in examples) > 128:
                continue  # cut to the context of the tiny model
            nll = [each.nll for each in likelihoods(base.model, examples, base.tokenizer.pad_token_id, 3)]
            chances = (-torch.tensor(nll)).softmax(dim=0)
            assert getattr(rating, name) == pytest.approx(float(chances[1] + 2 * chances[2]), abs=1e-4)
    alone = [judge.rate([prompt], [text], "very_positive")[0] for prompt, text in zip(prompts, TEXTS, strict=True)]
    assert [each.concept for each in alone] == pytest.approx([each.concept for each in found], abs=1e-5)
    # As a scorer it rates the text without its prompt.
    assert judge.score(TEXTS[1:2], "very_positive")[0].value == pytest.approx(found[1].concept / 2, abs=1e-5)


def test_the_overall_rating_is_a_harmonic_mean():
    assert Rating(2, 1, 1).overall == pytest.approx(1.2)
    assert Rating(2, 0, 1).overall == 0


def test_a_judge_is_a_scorer_of_any_label(model_dir):
    judge = scorer(f"judge:{model_dir}")
    assert isinstance(judge, Judge)
    assert label_of("cheerful", judge) == "cheerful"
    assert label_of("cheerful", judge, "merry") == "merry"
    with pytest.raises(ConfigError, match="reads whole texts"):
        scorer(f"judge:{model_dir}", exclude=["good"])
    with pytest.raises(ModelError, match="nowhere"):
        scorer("judge:nowhere")
