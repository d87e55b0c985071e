"""`braces steer --sweep`: points, measures by hand, bad input; baselines."""

import json
from types import SimpleNamespace

import pytest
import torch

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.attributes.build import attribute_from_descriptions, attribute_from_texts, description_pairs
from braces_cli.core.attributes.directions import pair_states
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.pooling import output_watches
from braces_cli.core.attributes.vector import STEERING_SHARE, load_attributes, save_attributes
from braces_cli.core.attributes.words import neutral_texts
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.generate import prompt_lengths
from braces_cli.core.models.tokenize import encode
from braces_cli.evaluation import sweep as sweeping
from braces_cli.evaluation.native_tasks import log_odds, probability, read_answer_pairs
from braces_cli.evaluation.sweep import at_equal_perplexity, baseline_methods, contrast_pairs
from braces_cli.scoring.scorers import Vader, distinct

KEYS = {"s", "attribute_score", "perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition", "n", "kl",
        "kl_first"}  # fmt: skip

TOKENS = torch.tensor([[0, 5, 6, 7, 8]])
PROMPTS = ["the film is", "a day", "the end of the old town", "a happy day in"]


@pytest.fixture
def swept(braces, model_dir):
    def call(*args, prompts=PROMPTS, sweep="-20:20:20", attribute=("--attribute", "positive")):
        given = [part for prompt in prompts for part in ("--prompt", prompt)]
        base = ["--model", model_dir, "--device", "cpu", "--max-new-tokens", 8, *attribute]
        return braces("steer", *base, *given, *(["--sweep", sweep] if sweep else []), *args)

    return call


@pytest.fixture
def labelled(swept, tmp_path):
    """Texts of the model at both ends, which a classifier can distinguish."""
    file = tmp_path / "rows.jsonl"
    ends = {"positive": 20, "negative": -20}
    rows = [
        {"text": row["text"], "label": label}
        for label, s in ends.items()
        for row in swept("--s", s, "--num-samples", 3, sweep=None).lines
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_one_document_with_a_point_for_each_strength(swept, adapter_dir, tmp_path):
    """With all keys of the contract and a PNG; without prompts, on the built-in ones."""
    plot = tmp_path / "sweep.png"
    outcome = swept("--adapter", adapter_dir, "--plot", plot, "--num-samples", 2, "--batch-size", 5)
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert [point["s"] for point in found["points"]] == [-20, 0, 20]
    assert all(set(point) >= KEYS and point["n"] == 8 for point in found["points"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert found["unsteered"] == found["points"][1]
    assert swept("--plot", plot).code == 2
    few = swept(prompts=[], sweep="0,1").json
    assert few["prompts"] >= 50
    assert few["points"][0]["n"] == few["prompts"]


def test_the_strength_is_chosen_on_one_half_and_measured_on_the_other(swept):
    """The measures are those of a sweep of each half of the prompts alone; of equal scores the weakest steering."""
    chosen = swept("--temperature", 0, sweep="0,4,2").json["chosen"]
    first, second = (swept("--temperature", 0, sweep="0,4,2", prompts=PROMPTS[start::2]).json for start in (0, 1))
    zero, four, two = first["points"]
    assert zero["attribute_score"] < four["attribute_score"] == two["attribute_score"]
    assert chosen["s"] == 2
    parts = (("on_choosing_half", two), ("on_other_half", second["points"][2]))
    for name, point in (*parts, ("unsteered_on_other_half", second["unsteered"])):
        for key in ("s", "attribute_score", "perplexity", "distinct_1", "n"):
            assert chosen[name][key] == pytest.approx(point[key], rel=1e-4)


def test_every_point_has_the_share_of_prompts_that_move_the_wrong_way(swept):
    """With its interval, in the document and in the table; by hand from the scores of the texts."""

    def values(s):
        rows = swept("--s", s, "--num-samples", 3, sweep=None).lines
        scores = [score.value for score in Vader().score([row["text"] for row in rows], "positive")]
        return [sum(scores[k : k + 3]) / 3 for k in range(0, len(scores), 3)]

    document = swept("--num-samples", 3).json
    before = values(0)
    for point in document["points"]:
        moves = [one - other for one, other in zip(values(point["s"]), before, strict=True)]
        assert point["effect"] == pytest.approx(sum(moves) / len(moves))
        if point["s"] == 0:
            assert point["wrong_way"] is None
            continue
        assert point["wrong_way"] == sum(move * point["s"] < 0 for move in moves) / len(moves)
        low, high = point["wrong_way_interval"]
        assert 0 <= low <= point["wrong_way"] <= high <= 1
        assert point["expected_maximum"] >= point["mean_value"]
        assert point["at_least_one"] >= point["attribute_score"]
    assert {"slope", "slope_interval", "negative", "negative_interval"} == set(document["slope"])
    assert "wrong way" in swept("--num-samples", 3, "--format", "table").out


@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
@pytest.mark.parametrize("adapted", [False, True])
def test_kl_is_that_of_next_tokens_and_limits_the_suggestion(swept, session, adapter_dir, adapted, scope):
    """By hand, row by row, against s = 0 with the adapter; `--max-kl` drops strengths from the suggestion."""
    options = ["--scope", scope, *(["--adapter", adapter_dir] if adapted else [])]
    document = swept(*options, sweep="0,10,20").json
    if adapted:
        session.add_adapter(find_adapter(str(adapter_dir)))
    terms = [(find_attribute(session, "positive", None), 20.0)]

    def divergence(text, start):
        ids, log_p = session.base.tokenizer(text)["input_ids"], []
        for steering in ([], terms):
            with steered(session, steering, scope=scope), torch.no_grad(), prompt_lengths(torch.tensor([[start]])):
                log_p.append(session.base.model(torch.tensor([ids])).logits[0].double().log_softmax(-1))
        return (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1)

    kl = [float(divergence(text, 99 if scope == "prompt" else 1).mean()) for text in neutral_texts()]
    first = [float(divergence(text, 99)[-1]) for text in PROMPTS]
    zero, _, twenty = document["points"]
    assert (zero["kl"], zero["kl_first"]) == (0, 0)
    assert twenty["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert twenty["kl_first"] == pytest.approx(sum(first) / len(first), rel=1e-3)
    assert (twenty["kl_first"] == 0) == (scope == "generated")
    small = min(point["kl"] for point in document["points"][1:])
    chosen = swept(*options, "--max-kl", small / 2, sweep="0,10,20").json["chosen"]
    assert (chosen["s"], chosen["max_kl"]) == (0, pytest.approx(small / 2))


def test_the_strength_with_the_least_kl_of_those_near_the_best_is_chosen(monkeypatch):
    """Within one standard error of the highest score; 0.1 at 0.9 of 9 texts."""
    rows = [(1, 0.5, 0.1), (2, 0.81, 0.3), (3, 0.9, 0.4), (4, 0.9, 0.2), (5, 0.79, 0.15), (6, 1.0, 0.1)]
    points = {
        s: {"s": s, "attribute_score": score, "kl": kl, "n": 9, "perplexity": 30.0 if s == 6 else 10.0}
        for s, score, kl in rows
    }
    monkeypatch.setattr(sweeping, "_point", lambda measured, unsteered, half: points[measured.s])
    measured = [SimpleNamespace(s=s, texts=SimpleNamespace(prompts="ab")) for s in points]
    assert sweeping._choose(measured, measured[0])["s"] == 4
    points[2]["kl"] = 0.15
    assert sweeping._choose(measured, measured[0])["s"] == 2
    assert sweeping._choose(measured, measured[0], 0.12)["s"] == 1
    assert sweeping._choose(measured, measured[0], 0.01) is None


def test_a_sweep_keeps_its_texts(swept, tmp_path):
    """Those of `steer` at the same strength, and those of baselines; a file is not replaced."""
    file = tmp_path / "texts.jsonl"
    options = ["--num-samples", 2, "--baselines", "prompting", "--output", file]
    document = swept(*options, sweep="0,20").json
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (plain,) = [swept("--s", 20, "--num-samples", 2, sweep=None).lines]
    ours = [row for row in rows if (row["method"], row["s"]) == ("braces", 20)]
    assert [(row["prompt"], row["sample"], row["text"]) for row in ours] == [
        (row["prompt"], row["sample"], row["text"]) for row in plain
    ]
    share = sum(row["has_attribute"] for row in ours) / len(ours)
    assert share == pytest.approx(document["points"][1]["attribute_score"])
    assert {row["method"] for row in rows} == {"braces", "prompting"}
    assert document["baselines"][0]["points"][0]["kl"] is None
    assert swept(*options, sweep="0").code == 2


def test_a_sweep_over_the_share_that_is_erased(swept, session):
    """0 is the unsteered model, 1 that of `--erase`; with an attribute, its strength is swept on the edited model."""
    options = ["--erase", "toxic", "--erase", "angry"]
    document = swept(*options, sweep="0,1", attribute=())
    assert document.code == 0, document.err
    before, after = document.json["points"]
    plain = swept(sweep="0").json["points"][0]
    assert [before[key] for key in ("perplexity", "distinct_1")] == [plain[key] for key in ("perplexity", "distinct_1")]
    assert before["kl"] == 0 < after["kl"]
    both = swept(*options, sweep="0,20").json
    assert both["erased"] == ["toxic", "angry"]
    assert both["points"][0]["distinct_1"] == after["distinct_1"]


def test_detection_is_of_the_base_without_its_adapter(swept, adapter_dir, tmp_path):
    rows = [{"text": f"the {c} film", "label": ("positive", "other")[i % 2]} for i, c in enumerate("abcdefgh")]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = swept("--detect", file, sweep="0").json["detection"]
    assert found == swept("--detect", file, "--adapter", adapter_dir, sweep="0").json["detection"]
    assert found["n"] == 4
    assert 0 <= found["auroc"] <= 1
    refused = swept("--detect", file, "--score-label", "negative", "--scorer", "vader", sweep="0")
    assert refused.code == 3
    assert "The rows have other, positive" in refused.err


def test_perplexity_is_of_the_base_without_its_adapter(swept, adapter_dir, model_dir, session):
    """By hand on the texts of `steer`, and equal to that under the base as reference model."""
    args = ["--adapter", adapter_dir, "--temperature", 0]
    point = swept(*args, sweep="30").json["points"][0]
    texts = swept(*args, "--s", 30, sweep=None).lines
    nats, tokens = 0.0, 0
    for row in texts:
        start = len(session.base.tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([encode(session.base.tokenizer, row["prompt"] + row["text"]).ids])
        with torch.no_grad():
            logits = session.base.model(ids).logits[0, :-1].log_softmax(-1)
        picked = logits.gather(1, ids[0, 1:, None])[:, 0]
        nats, tokens = nats - float(picked[start - 1 :].sum()), tokens + ids.shape[1] - start
    assert point["perplexity"] == pytest.approx(float(torch.tensor(nats / tokens).exp()), rel=1e-3)
    judged = swept(*args, "--reference-model", model_dir, sweep="30").json["points"][0]
    assert judged["perplexity"] == pytest.approx(point["perplexity"], rel=1e-4)


def test_a_point_depends_on_its_strength_alone(swept):
    """Not on the other strengths, nor on the batch size."""
    keys = KEYS - {"repetition"}
    one = swept(sweep="20").json["points"][0]
    other = swept("--batch-size", 3).json["points"][2]
    assert {key: one[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, rel=1e-4)


def test_a_sweep_uses_the_chat_template(swept, chatty, model_dir):
    """Measures equal those of prompts written out as by the template; without a template it is refused."""
    chat = ["--model", chatty, "--apply-chat-template"]
    templated = swept(*chat, sweep="20").json
    spelt = swept(sweep="20", prompts=[f"user: {prompt}\nassistant:" for prompt in PROMPTS]).json
    assert (templated["apply_chat_template"], spelt["apply_chat_template"]) == (True, False)
    point, same, plain = (each["points"][0] for each in (templated, spelt, swept(sweep="20").json))
    assert {name: point[name] for name in KEYS} == pytest.approx({name: same[name] for name in KEYS}, rel=1e-4)
    assert point["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-4)
    assert "no chat template" in swept("--apply-chat-template").err


def test_a_classifier_or_a_language_model_scores_the_texts(swept, labelled, model_dir):
    fitted = swept("--scorer", f"fit:{labelled}")
    assert fitted.code == 0, fitted.err
    low, _, high = (point["mean_value"] for point in fitted.json["points"])
    assert low < high
    assert {"wonderful", "awful"} <= set(swept("--exclude-list-words").json["excluded_words"])
    rated = swept("--scorer", f"judge:{model_dir}", "--score-label", "cheerful", sweep="0,20").json
    assert rated["label"] == "cheerful"
    for point in rated["points"]:
        assert all(0 <= point[name] <= 2 for name in ("concept", "relevance", "fluency", "overall"))
        assert point["mean_value"] == pytest.approx(point["concept"] / 2)


def test_the_preference_between_two_answers_shifts(swept, session, write_jsonl):
    rows = [{"prompt": f"the film {i} is", "positive": " good", "negative": " sad"} for i in range(3)]
    file = write_jsonl("answers.jsonl", rows)
    document = swept("--answers", file, prompts=["a day", "the end"], sweep="-20,20").json
    pairs = read_answer_pairs(file)
    positive = find_attribute(session, "positive", None)
    bare = log_odds(session, pairs, 8)
    for found, s in zip(document["answers"], (-20.0, 20.0), strict=True):
        with steered(session, [(positive, s)]):
            odds = log_odds(session, pairs, 8)
        moves = [one - other for one, other in zip(odds, bare, strict=True)]
        assert (found["s"], found["shift"]) == pytest.approx((s, sum(moves) / 3), abs=1e-4)
        assert found["wrong_way"] == pytest.approx(sum(move * s < 0 for move in moves) / 3)
        assert found["prefers_positive"] == pytest.approx(sum(each > 0 for each in odds) / 3)
        assert found["probability"] == pytest.approx(sum(map(probability, odds)) / 3, abs=1e-5)
    low, high = (found["shift"] for found in document["answers"])
    assert document["answer_slope"]["slope"] == pytest.approx((high - low) / 40, abs=1e-5)


def _point(s, score, perplexity):
    return {"s": s, "attribute_score": score, "perplexity": perplexity}


def test_scores_at_equal_perplexity_are_interpolated():
    swept = {
        "unsteered": _point(0, 0.4, 10.0),
        "points": [_point(-1, 0.3, 9.0), _point(0, 0.4, 10.0), _point(2, 0.6, 20.0), _point(1, 0.5, 12.0)],
        "baselines": [{"method": "prompting", "points": [_point(1.0, 0.7, 13.0)]}],
    }
    rows = {(row["method"], row["side"], row["ratio"]): row for row in at_equal_perplexity(swept)}
    ours = rows["braces", 1, 1.5]
    # ln(15 / 12) of ln(20 / 12) of the way from s = 1 to s = 2.
    assert (ours["attribute_score"], ours["s"]) == pytest.approx((0.5437, 1.4368), abs=1e-4)
    assert ours["reached"]
    assert rows["braces", -1, 1.5] == {
        "method": "braces", "side": -1, "ratio": 1.5, "attribute_score": 0.3, "s": -1, "reached": False
    }  # fmt: skip
    assert rows["prompting", 1, 1.25]["reached"]
    assert not rows["prompting", 1, 1.5]["reached"]
    assert rows["prompting", 1, 1.5]["attribute_score"] == 0.7
    assert ("prompting", -1, 1.5) not in rows


@pytest.mark.parametrize(
    ("args", "sweep", "code", "message"),
    [
        ([], "-4:4", 2, "is not FROM:TO:STEP"),
        (["--s", "1"], "-4:4:1", 2, "1 strengths for 0 other attributes"),
        (["--scorer", "fit:nowhere.jsonl"], "-4:4:1", 3, "no such file"),
        (["--score-label", "x"], "-4:4:1", 2, "It has positive, negative"),
        (["--plot", "x.png"], None, 2, "belongs to --sweep"),
        (["--baselines", "promting"], "0", 2, "Did you mean prompting?"),
        (["--answers", "nowhere.jsonl"], "0", 3, "no such file"),
        (["--reference-model", "nowhere"], "0", 4, "nowhere"),
    ],
)
def test_wrong_input_is_refused(swept, args, sweep, code, message):
    """In two lines, with the exit code."""
    outcome = swept(*args, sweep=sweep)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert outcome.out == ""


@pytest.fixture
def positive(session):
    return find_attribute(session, "positive", None)


@pytest.mark.parametrize("name", ["difference", "pca"])
def test_a_direction_is_added_after_the_steered_layers(session, positive, name):
    """At s = 1 by the share of the residual norm; at s = 0 the model is bit-identical."""
    (method,) = baseline_methods(session, [name], positive, [1.0])
    model = session.base.model
    states = pair_states(session, contrast_pairs(positive), output_watches(session.base.model, session.ffns))
    difference = (states.positive[0] - states.negative[0]).mean(dim=0)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, output: seen.append(output[0, -1].clone()))
    with torch.no_grad():
        bare = model(TOKENS).logits
        with method.steering(1.0):
            handle.remove()
            handle = model.model.layers[0].register_forward_hook(lambda m, a, output: seen.append(output[0, -1]))
            moved = model(TOKENS).logits
        with method.steering(0.0):
            assert torch.equal(model(TOKENS).logits, bare)
        assert torch.equal(model(TOKENS).logits, bare)
    handle.remove()
    assert not torch.allclose(moved, bare)
    added = seen[1] - seen[0]
    assert positive.effective_layers == [0]
    assert float(added.norm()) == pytest.approx(STEERING_SHARE * float(positive.residual[0]), rel=1e-3)
    assert float(added @ difference) > 0
    if name == "difference":
        assert float(torch.cosine_similarity(added, difference, dim=0)) == pytest.approx(1, abs=1e-4)


def test_baselines_steer_the_base_without_its_adapter(session, positive, adapter_dir):
    with torch.no_grad():
        bare = session.base.model(TOKENS).logits
        session.add_adapter(find_adapter(str(adapter_dir)))
        assert not torch.equal(session.base.model(TOKENS).logits, bare)
        for method in baseline_methods(session, ["prompting", "pca"], positive, [1.0]):
            with method.steering(0.0):
                assert torch.equal(session.base.model(TOKENS).logits, bare)


def test_prompting_puts_an_instruction_before_each_prompt(session, positive):
    (method,) = baseline_methods(session, ["prompting"], positive, [-2.0, 0.0, 3.0])
    assert method.strengths == [1.0, -1.0]
    assert method.inputs(["a day"], 1.0) == ["Write something positive: a day"]
    assert method.inputs(["a day"], -1.0) == ["Write something negative: a day"]
    texts = attribute_from_texts(session, "very_warm", ["a happy day"])
    (method,) = baseline_methods(session, ["prompting"], texts, [-1.0])
    assert method.inputs(["a day"], -1.0) == ["Write something not very warm: a day"]
    with pytest.raises(ConfigError, match="was built from texts"):
        baseline_methods(session, ["pca"], texts, [1.0])


def test_pairs_of_descriptions_are_built_from_the_attribute_file(session, tmp_path):
    sides = ["a cheerful person"], ["a gloomy person"]
    built = attribute_from_descriptions(session, "cheerful", *sides, reduction="mean")
    save_attributes(tmp_path / "cheerful.safetensors", [built])
    read = load_attributes(tmp_path / "cheerful.safetensors", session)["cheerful"]
    assert contrast_pairs(read) == description_pairs(*sides)


def test_baselines_are_in_document_table_and_plot(swept, tmp_path):
    plot = tmp_path / "sweep.png"
    outcome = swept("--baselines", "prompting, pca", "--plot", plot)
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["points"] == swept().json["points"]
    assert [(each["method"], [point["s"] for point in each["points"]]) for each in found["baselines"]] == [
        ("prompting", [1.0, -1.0]), ("pca", [-20.0, 0.0, 20.0])
    ]  # fmt: skip
    assert found["baselines"][1]["points"][1] == found["unsteered"]
    texts = swept("--s", 0, sweep=None, prompts=[f"Write something positive: {prompt}" for prompt in PROMPTS]).lines
    expected = distinct([[row["text"]] for row in texts], 1)
    assert found["baselines"][0]["points"][0]["distinct_1"] == pytest.approx(expected)
    assert "at equal perplexity" in swept("--baselines", "difference", "--format", "table").out
    assert plot.read_bytes().startswith(b"\x89PNG")
