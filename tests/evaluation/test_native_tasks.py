"""Tasks of braces: perplexity, preference between two answers, detection."""

import logging
import math
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import braces_cli
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.directions import area
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.distributed import Processes
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.models.load import load_base
from braces_cli.core.options import LoadOptions
from braces_cli.core.progress import silent
from braces_cli.evaluation import native_tasks
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.tables import result_tables
from tests.evaluation.conftest import evaluate


def _perplexities(base, texts, batch_size):
    session = Session(base, [])
    context = native_tasks.TaskContext(session, EvalSettings(batch_size=str(batch_size)), False, (), Processes())
    return native_tasks.PERPLEXITY.prepare(context, texts)(nullcontext(), "perplexity").results["perplexity"]


def test_each_document_follows_exactly_one_start_token(tiny_folder):
    base = load_base(str(tiny_folder), LoadOptions(device="cpu"))
    texts = ["A first line.", "Ein zweiter, längerer  Satz.", "x"]
    found = _perplexities(base, texts, 2)
    nats = []
    for text in texts:
        ids = torch.tensor([[0, *base.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        assert (ids == 0).sum() == 1
        with torch.no_grad():
            nats.append(base.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
    size = sum(len(text.encode()) for text in texts)
    want = {
        "word_perplexity": math.exp(sum(nats) / 8),
        "byte_perplexity": math.exp(sum(nats) / size),
        "bits_per_byte": sum(nats) / size / math.log(2),
        "token_perplexity": math.exp(sum(nats) / size),  # this tokenizer's tokens are bytes
    }
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("start", ["added", "not added", "none"])
def test_training_measures_texts_as_the_task_perplexity(model_dir, write_jsonl, tmp_path, start):
    """With a start token that the tokenizer adds or only has, or without one; some texts exceed --max-length."""
    folder, texts = tmp_path / "model", ["the film is good", " ".join(["the end is sad"] * 60), "a"]
    shutil.copytree(model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if start != "added":
        tokenizer.backend_tokenizer.post_processor = None
    if start == "none":
        tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    rows, out = write_jsonl("rows.jsonl", [{"text": text} for text in texts]), tmp_path / "out"
    options = {"model": folder, "eval_data": rows, "max_length": 16, "max_steps": 3, "warmup_steps": 0, "lr": 0.1}
    trained = braces_cli.train(rows, out, device="cpu", **options)
    settings = EvalSettings(tasks=("perplexity",), task_data=(f"perplexity={rows}",))
    found = [each["results"]["perplexity"] for each in evaluate(None, [str(out)], settings)["systems"]]
    expected = [trained["base_eval_perplexity"], trained["eval_perplexity"]]
    assert [each["token_perplexity"]["value"] for each in found] == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)


def test_the_delta_method_agrees_with_the_spread_of_resampled_texts(tiny_folder):
    base = load_base(str(tiny_folder), LoadOptions(device="cpu"))
    found = _perplexities(base, [f"text {i} " * (1 + i % 3) for i in range(60)], 16)["bits_per_byte"]
    nats = np.array(list(found.documents.values()))
    units = np.array(list(found.units.values()))
    drawn = np.random.default_rng(0).integers(60, size=(4000, 60))
    spread = (nats[drawn].sum(1) / units[drawn].sum(1) / math.log(2)).std()
    assert found.stderr == pytest.approx(spread, rel=0.15)


ANSWERS = [
    {"prompt": "the film is", "positive": " good", "negative": " sad"},
    {"question": "the end?\n (A) a day (B) old\n", "answer_matching_behavior": " (A)",
     "answer_not_matching_behavior": " (B)"},
    {"positive": "a happy day", "negative": "the end"},
]  # fmt: skip


def test_log_odds_are_those_of_whole_answers(session, write_jsonl):
    """Also with the field names of published data sets, and without a prompt."""
    pairs = native_tasks.read_answer_pairs(write_jsonl("answers.jsonl", ANSWERS))
    assert [pair.prompt for pair in pairs] == ["the film is", ANSWERS[1]["question"], ""]
    found = native_tasks.log_odds(session, pairs, 2)

    def likelihood(prompt, answer):
        start = max(len(session.base.tokenizer(prompt)["input_ids"]), 1)
        ids = torch.tensor([session.base.tokenizer(prompt + answer)["input_ids"]])
        with torch.no_grad():
            logits = session.base.model(ids).logits[0, :-1].log_softmax(-1)
        return float(logits.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    for pair, odds in zip(pairs, found, strict=True):
        expected = likelihood(pair.prompt, pair.positive) - likelihood(pair.prompt, pair.negative)
        assert odds == pytest.approx(expected, abs=1e-3)
    assert native_tasks.probability(0.0) == 0.5
    assert native_tasks.probability(-1000.0) == 0
    assert native_tasks.probability(2.0) == pytest.approx(math.exp(2) / (1 + math.exp(2)))


@pytest.mark.parametrize("row", [{"prompt": "x", "positive": "a"}, {"positive": "a", "negative": "a"}, {"text": "a"}])
def test_rows_without_two_answers_are_refused(write_jsonl, row):
    with pytest.raises(DataError, match=r"answers.jsonl.*no two different answers"):
        native_tasks.read_answer_pairs(write_jsonl("answers.jsonl", [row]))


PAIRS = [{"prompt": f"the film {i} is", "positive": " good", "negative": " sad"} for i in range(5)]


def test_answers_shift_with_the_strength(model_dir, session, write_jsonl):
    """Preferences equal those of the steered model; slopes are over the same documents."""
    data = (f"answers={write_jsonl('answers.jsonl', PAIRS)}",)
    settings = EvalSettings(tasks=("answers",), task_data=data, attribute=("positive",), s=("-20,20",))
    result = evaluate(str(model_dir), [], settings)
    positive = find_attribute(session, "positive", None)
    pairs = [native_tasks.AnswerPair(**row) for row in PAIRS]
    lines = []
    for system, s in zip(result["systems"], (0.0, -20.0, 20.0), strict=True):
        with steered(session, [(positive, s)]):
            odds = native_tasks.log_odds(session, pairs, 8)
        entry = system["results"]["answers"]["log_odds"]
        assert entry["value"] == pytest.approx(np.mean(odds), abs=1e-4)
        assert entry["stderr"] == pytest.approx(np.std(odds, ddof=1) / 5**0.5, abs=1e-4)
        lines.append(odds)
    expected = np.polyfit([0, -20, 20], np.array(lines), 1)[0]
    found = next(row for row in result["slopes"] if row["metric"] == "log_odds")
    assert found["slope"] == pytest.approx(expected.mean(), abs=1e-5)
    assert (found["system"], found["attribute"], found["n"]) == ("base", "positive", 5)
    assert len(result_tables(result)[-1][2]) == 3


TEXTS = ["the film is good", "a happy day", "the end of the old town", "is sad", "good and happy", "in the town"]


def test_a_score_is_the_largest_projection_of_a_token(session):
    good = build_attribute(session, "good", ["good", "happy"])
    found = native_tasks.projections(session, good, TEXTS, silent)
    assert found.shape == (2, 6)
    for column, text in enumerate(TEXTS):
        entered: dict[int, torch.Tensor] = {}
        handles = [
            ffn.watch(lambda h, i=i, seen=entered: seen.update({i: h[0, 1:]})) for i, ffn in enumerate(session.ffns)
        ]
        with torch.no_grad():
            session.base.model(torch.tensor([session.base.tokenizer(text)["input_ids"]]))
        for handle in handles:
            handle.remove()
        for layer, h in entered.items():
            direction = good.state[layer] / good.state[layer].norm()
            assert float(found[layer, column]) == pytest.approx(float((h @ direction).max()), rel=1e-4)


def test_the_layer_is_chosen_on_half_of_the_texts(session):
    from sklearn.metrics import roc_auc_score

    good = build_attribute(session, "good", ["good", "happy"])
    has = [True, True, False, False, True, False]
    scores = native_tasks.projections(session, good, TEXTS, silent)
    rows = [(text, "Good" if flag else "other") for text, flag in zip(TEXTS, has, strict=True)]
    found = native_tasks.detection(session, good, rows, "good", "rows", silent)
    for row in found["layers"]:
        assert row["auroc"] == pytest.approx(roc_auc_score(has, scores[row["layer"]]))
    chosen = [roc_auc_score([1, 1, 0, 0], scores[layer][[0, 4, 2, 5]]) for layer in range(2)]
    assert chosen[found["layer"]] == max(chosen)
    assert found["auroc"] == pytest.approx(roc_auc_score([1, 0], scores[found["layer"]][[1, 3]]))
    assert found["n"] == 2
    with pytest.raises(DataError, match="1 texts are `good` and 5 are not"):
        native_tasks.detection(
            session, good, [rows[0], *((text, "other") for text in TEXTS[1:])], "good", "rows", silent
        )


def test_ties_count_half_and_the_error_is_that_of_resampling():
    assert area(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.875)
    generator = torch.Generator().manual_seed(0)
    drawn = [area(torch.randn(60, generator=generator) + 1, torch.randn(80, generator=generator)) for _ in range(400)]
    value = sum(drawn) / len(drawn)
    spread = torch.tensor(drawn).std().item()
    assert native_tasks.area_error(value, 60, 80) == pytest.approx(spread, rel=0.15)


def test_detection_is_the_same_at_every_strength(model_dir, session, write_jsonl, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="braces")
    texts = [("the film is good", "Positive"), ("a day", "other"), ("happy", "positive"), ("old", "other")] * 2
    file = write_jsonl("rows.jsonl", [{"text": text, "label": label} for text, label in texts])
    settings = EvalSettings(tasks=("detection",), task_data=(f"detection={file}",), attribute=("positive",), s=("20",))
    result = evaluate(str(model_dir), [], settings)
    expected = native_tasks.detection(
        session, find_attribute(session, "positive", None), texts, "positive", "rows", silent
    )
    for system in result["systems"]:
        assert system["results"]["detection"]["auroc"] == {
            "value": expected["auroc"], "stderr": expected["auroc_stderr"], "n": 4, "chance": 0.5
        }  # fmt: skip
    assert "detection on 8 rows is inexact; give 200 or more" in caplog.text
    with pytest.raises(ConfigError, match="detection needs one attribute, not 0"):
        evaluate("nowhere", [], settings, attribute=(), s=())
