"""The embedded model: size, tokenizer, perplexity, name."""

import json
import math
from pathlib import Path

import pytest

from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import ModelError
from braces_cli.core.models.hub import ABOUT_FILE, embedded_name, note_default
from braces_cli.core.models.load import load_base, load_tokenizer
from braces_cli.core.options import LoadOptions, Sampling
from braces_cli.scoring.likelihood import Likelihood, text_likelihoods
from braces_cli.steering.texts import generate_texts, text_requests
from tests.conftest import make_adapter

OPTIONS = LoadOptions(device="cpu", dtype="float32")
ODD = ["", " two  spaces ", "ünïcödé ☃ line\nnext", "Zxqj McDonald's 12345!", "the film is good"]


@pytest.fixture(scope="module")
def held_out(embedded: Path) -> list[str]:
    lines = (embedded.parent / "embedded_tasks" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_both_forms_of_the_tokenizer_agree(embedded: Path, held_out: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(embedded / "tokenizer.model"))
    tokenizer = load_tokenizer(str(embedded))
    for text in [*held_out, *ODD]:
        ids = tokenizer(text)["input_ids"]
        assert ids == [pieces.bos_id(), *pieces.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_held_out_perplexity_is_that_in_its_description(embedded: Path, held_out: list[str]) -> None:
    stated = json.loads((embedded / ABOUT_FILE).read_text(encoding="utf-8"))["held_out_perplexity"]
    base = load_base("embedded", OPTIONS)
    parts = text_likelihoods(base.model, base.tokenizer, held_out, base.model.config.max_position_embeddings, 32)
    assert base.name == load_base(embedded_name(), OPTIONS).name == embedded_name()
    assert math.isclose(sum(parts, Likelihood()).perplexity, stated, rel_tol=1e-3)


def test_an_adapter_stores_the_version(tmp_path: Path) -> None:
    folder = make_adapter(open_session("embedded", None, OPTIONS), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == embedded_name()
    assert open_session(None, str(folder), OPTIONS).base.name == embedded_name()

    config["base_model_name_or_path"] = "embedded@0.0.0"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=embedded_name()) as caught:
        open_session(None, str(folder), OPTIONS)
    assert caught.value.where == "embedded@0.0.0"
    assert "train again" in str(caught.value.hint)


def test_without_a_model_one_line_names_the_embedded_model(braces) -> None:
    note_default.cache_clear()
    command = ("steer", "--prompt", "The film is", "--max-new-tokens", 4, "--device", "cpu")
    outcome = braces(*command)
    assert outcome.code == 0
    assert outcome.lines[0]["text"].strip()
    lines = [line for line in outcome.err.splitlines() if embedded_name() in line]
    assert len(lines) == 1
    assert "--model" in lines[0]
    note_default.cache_clear()
    assert embedded_name() not in braces(*command, "--quiet").err
    note_default.cache_clear()
    assert embedded_name() not in braces(*command, "--model", "embedded").err


def test_a_word_list_steers_its_sentiment_without_training() -> None:
    """Shares of positive texts at s = -3, 0 and 3."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    session = open_session("embedded", None, OPTIONS)
    positive = find_attribute(session, "positive", None)
    prompts = ["The film is", "We stayed at the hotel and", "I bought the phone and", "The coffee was", "This book is"]
    score = SentimentIntensityAnalyzer().polarity_scores
    share = {}
    for s in (-3.0, 0.0, 3.0):
        with steered(session, [(positive, s)]):
            texts = list(generate_texts(session, text_requests(prompts, 8), Sampling(max_new_tokens=30), batch_size=40))
        share[s] = sum(score(text)["compound"] > 0.05 for text in texts) / len(texts)
    assert share[-3.0] + 0.15 < share[0.0] < share[3.0] - 0.15
    assert share[3.0] - share[-3.0] >= 0.4
