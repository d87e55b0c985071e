"""The whole evaluation on small models: equal to lm-eval itself, side by side, and failing early."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from braces_cli.core.adapter.model import Session
from braces_cli.core.config import build
from braces_cli.core.distributed import Processes
from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.models.load import load_base
from braces_cli.core.options import LoadOptions
from braces_cli.evaluation import catalog, lm_eval_runner
from braces_cli.evaluation import run as run_module
from braces_cli.evaluation.native_tasks import PERPLEXITY, TaskContext
from braces_cli.evaluation.run import run_evaluation
from braces_cli.evaluation.settings import EvalSettings

CPU = LoadOptions(device="cpu")
LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
FILES = {
    "truthfulqa_mc1": "truthfulqa/multiple_choice.jsonl",
    "truthfulqa_mc2": "truthfulqa/multiple_choice.jsonl",
    "triviaqa": "triviaqa/validation.jsonl",
    "popqa": "popqa/test.jsonl",
}


DEFINITIONS = {
    "triviaqa": "triviaqa/default.yaml",
    "nq_open": "nq_open/nq_open.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}


def _popqa(count: int) -> list[dict]:
    return [{"question": f"What is {i}?", "possible_answers": json.dumps([chr(97 + i)])} for i in range(count)]


def _direct(folder: Path, name: str, file: Path, limit: int, shots: int | None, tmp_path: Path):
    """lm-eval by itself: model by name, the task's YAML, and `datasets` reading the very file."""
    include = DEFINITIONS.get(name, f"truthfulqa/{name}.yaml")
    source = catalog.BRACES_FOLDER / "popqa.yaml" if name == "popqa" else LM_EVAL_TASKS / include
    files = dict.fromkeys(("train", "validation", "test"), str(file))
    lines = [
        f"include: {source}", f"task: {name}", "dataset_path: json", "dataset_name: null",
        "dataset_kwargs: " + json.dumps({"data_files": files, "cache_dir": str(tmp_path / "cache")}),
    ]  # fmt: skip
    (tmp_path / f"{name}.yaml").write_text("\n".join(lines))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=1234)
    model = HFLM(pretrained=str(folder), device="cpu", batch_size="8")
    return lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit)


def _ours(folder: Path, names: list[str], data: list[str], limit: int, shots: int | None, monkeypatch):
    seen: list = []
    original = lm_eval.evaluate

    def spy(**kwargs):
        seen.append(original(**kwargs))
        return seen[-1]

    monkeypatch.setattr(lm_eval_runner.lm_eval, "evaluate", spy)
    settings = EvalSettings(tasks=names, task_data=data, limit=limit, num_fewshot=shots)
    result = run_evaluation(str(folder), [], CPU, settings)
    monkeypatch.undo()
    return result, seen[0]


@pytest.mark.parametrize(("name", "shots"), [*((name, None) for name in FILES), ("triviaqa", 1)])
def test_the_base_scores_what_lm_eval_scores_document_by_document(shared, tmp_path, monkeypatch, name, shots):
    stories, file = shared / "models" / "stories260K", shared / "data" / FILES[name]
    limit = 4
    result, found = _ours(stories, [name], [f"{name}={file}"], limit, shots, monkeypatch)
    expected = _direct(stories, name, file, limit, shots, tmp_path)
    ours, theirs = found["samples"][name], expected["samples"][name]
    assert len(ours) == len(theirs) == limit
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["doc_id"] == other["doc_id"]
        assert [a[0] for a in mine["arguments"]] == [a[0] for a in other["arguments"]]
        for metric in other["metrics"]:
            assert mine[metric] == pytest.approx(other[metric], abs=1e-9)
    for key, value in expected["results"][name].items():
        metric, sign, _ = key.partition(",")
        if sign and not metric.endswith("_stderr"):
            entry = result["systems"][0]["results"][name][metric]
            assert entry["value"] == pytest.approx(value, abs=1e-9)
            assert entry["n"] == limit
            assert entry["stderr"] == pytest.approx(expected["results"][name][key.replace(",", "_stderr,")], abs=1e-9)


# Rows in the schema of the hub's sets, for tasks of which ../shared has no such file.
ROWS = {
    "nq_open": [{"question": f"who is number {i}", "answer": ["No one", chr(97 + i)]} for i in range(5)],
    "arc_easy": [
        {"question": f"Which is {i}?", "choices": {"text": [f"the {i}", "none", "all of it"], "label": list("ABC")},
         "answerKey": "ABC"[i % 3]} for i in range(5)
    ],
    "piqa": [{"goal": f"To do {i}", "sol1": "do it well", "sol2": f"do {i} twice", "label": i % 2} for i in range(5)],
    "winogrande": [
        {"sentence": f"The {i} did not fit the box because _ was too big.", "option1": "the box", "option2": f"the {i}",
         "answer": "12"[i % 2]} for i in range(5)
    ],
    "hellaswag": [
        {"activity_label": "Jumping", "ctx_a": f"The boy {i} jumps.", "ctx_b": "he", "label": str(i % 2),
         "endings": ["lands on [a] mat.", f"flies {i} times.", "stops.", "goes on."]} for i in range(5)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", list(ROWS))
def test_tasks_of_local_rows_score_what_lm_eval_scores(tiny_folder, write_jsonl, tmp_path, monkeypatch, name):
    file = write_jsonl(f"{name}.jsonl", ROWS[name])
    _, found = _ours(tiny_folder, [name], [f"{name}={file}"], 5, None, monkeypatch)
    expected = _direct(tiny_folder, name, file, 5, None, tmp_path)
    ours, theirs = found["samples"][name], expected["samples"][name]
    assert len(ours) == len(theirs) == 5
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["arguments"] == other["arguments"]
        assert mine["resps"] == other["resps"]
        for metric in other["metrics"]:
            assert mine[metric] == other[metric]


def test_base_and_adapters_stand_side_by_side(tiny_folder, make_adapter, write_jsonl, tmp_path):
    adapters = [str(make_adapter(tiny_folder, seed)) for seed in (0, 1)]
    text = tmp_path / "t.txt"
    text.write_text("A first line.\nAnd a second, longer one.\n")
    data = [f"popqa={write_jsonl('p.jsonl', _popqa(6))}", f"perplexity={text}"]
    result = run_evaluation(None, adapters, CPU, EvalSettings(tasks=["popqa,perplexity"], task_data=data, limit=5))
    assert [s["adapter"] for s in result["systems"]] == [None, *adapters]
    assert [s["name"] for s in result["systems"]] == ["base", "seed0", "seed1"]
    assert {s["model"] for s in result["systems"]} == {str(tiny_folder)}
    bits = [s["results"]["perplexity"]["bits_per_byte"]["value"] for s in result["systems"]]
    assert len(set(bits)) == 3  # each adapter does something, and another thing than the other
    assert result["systems"][0]["results"]["popqa"]["acc"]["n"] == 5
    assert result["systems"][0]["results"]["perplexity"]["bits_per_byte"]["n"] == 2
    pairs = {(c["task"], c["metric"], c["from"], c["to"]) for c in result["comparisons"]}
    assert len(pairs) == len(result["comparisons"]) == 3 * (2 + 4)  # base to each, and one to the other
    for row in result["comparisons"]:
        assert 0 < row["p_value"] <= 1
    row = next(c for c in result["comparisons"] if (c["metric"], c["to"]) == ("bits_per_byte", "seed1"))
    assert row["difference"] == bits[2] - bits[0]
    assert result["settings"]["batch_size"] == 8
    assert {"braces", "torch", "transformers", "lm-eval"} <= result["settings"]["versions"].keys()

    bare = run_evaluation(str(tiny_folder), [], CPU, EvalSettings(tasks=["popqa,perplexity"], task_data=data, limit=5))
    assert bare["systems"][0]["results"] == result["systems"][0]["results"]  # the adapters were off
    alone = run_evaluation(
        None, adapters[1:], CPU, EvalSettings(tasks=["popqa,perplexity"], task_data=data, limit=5, no_base=True)
    )
    assert [s["results"] for s in alone["systems"]] == [result["systems"][2]["results"]]
    assert alone["comparisons"] == []


def _perplexities(base, texts, batch_size):
    session = Session(base, [])
    context = TaskContext(session, EvalSettings(), batch_size, False, (), Processes())
    return PERPLEXITY.prepare(context, texts)(nullcontext(), "perplexity").results["perplexity"]


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


def test_the_delta_method_agrees_with_the_spread_of_resampled_texts(tiny_folder):
    import numpy as np

    base = load_base(str(tiny_folder), LoadOptions(device="cpu"))
    found = _perplexities(base, [f"text {i} " * (1 + i % 3) for i in range(60)], 16)["bits_per_byte"]
    nats = np.array(list(found.documents.values()))
    units = np.array(list(found.units.values()))
    drawn = np.random.default_rng(0).integers(60, size=(4000, 60))
    spread = (nats[drawn].sum(1) / units[drawn].sum(1) / math.log(2)).std()
    assert found.stderr == pytest.approx(spread, rel=0.15)


def test_a_changed_file_is_read_anew(tiny_folder, write_jsonl):
    settings = EvalSettings(tasks=["popqa"], task_data=[f"popqa={write_jsonl('p.jsonl', _popqa(3))}"])
    assert run_evaluation(str(tiny_folder), [], CPU, settings)["systems"][0]["results"]["popqa"]["acc"]["n"] == 3
    write_jsonl("p.jsonl", _popqa(4))
    assert run_evaluation(str(tiny_folder), [], CPU, settings)["systems"][0]["results"]["popqa"]["acc"]["n"] == 4


@pytest.mark.parametrize("name", ["popqa", "mmlu_anatomy"])  # the second has its examples in another split
def test_a_document_is_never_an_example_of_itself(tiny_folder, write_jsonl, monkeypatch, name):
    rows = [{**row, "choices": ["a", "b", "c", "d"], "answer": 1} for row in _popqa(4)]
    _, found = _ours(tiny_folder, [name], [f"{name}={write_jsonl('p.jsonl', rows)}"], 4, 3, monkeypatch)
    for sample in found["samples"][name]:
        prompt = sample["arguments"][0][0]
        assert prompt.count("What is ") == 4
        assert prompt.count(sample["doc"]["question"]) == 1


def test_popqa_asks_as_its_authors_do(tiny_folder, write_jsonl, monkeypatch):
    _, found = _ours(tiny_folder, ["popqa"], [f"popqa={write_jsonl('p.jsonl', _popqa(1))}"], 1, None, monkeypatch)
    prompt, settings = found["samples"]["popqa"][0]["arguments"][0]
    assert prompt == "Q: What is 0? A:"
    assert (settings["max_gen_toks"], settings["until"], settings["do_sample"]) == (15, ["\n"], False)


def test_an_adapter_that_does_not_fit_fails_before_the_base_is_measured(
    tiny_folder, make_adapter, write_jsonl, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_module, "_measure", lambda *a: pytest.fail("measured"))
    good, bad = make_adapter(tiny_folder), tmp_path / "bad"
    bad.mkdir()
    for file in good.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    config = json.loads((bad / "adapter_config.json").read_text())
    other = copy.deepcopy(config)
    other["fingerprint"]["sha256"] = "0" * 64
    (bad / "adapter_config.json").write_text(json.dumps(other))
    settings = EvalSettings(tasks=["popqa"], task_data=[f"popqa={write_jsonl('p.jsonl', _popqa(2))}"])
    with pytest.raises(ModelError, match="another base"):
        run_evaluation(str(tiny_folder), [str(good), str(bad)], CPU, settings)


def test_rows_that_only_lm_eval_can_judge_are_refused_before_a_model_is_loaded(write_jsonl, monkeypatch):
    monkeypatch.setattr(run_module, "open_session", lambda *a: pytest.fail("loaded"))
    row = {"question": "Q?", "correct_answer": "a", "support": "s", **{f"distractor{i}": "b" for i in (1, 2, 3)}}
    first = write_jsonl("first.jsonl", [{"question": "Q?"}])
    with pytest.raises(DataError, match="sciq cannot read the rows"):
        run_evaluation("m", [], CPU, EvalSettings(tasks=["sciq"], task_data=[f"sciq={first}"]))
    second = write_jsonl("second.jsonl", [row, {"question": "Q?"}])
    with pytest.raises(DataError, match="sciq cannot read the row") as caught:
        run_evaluation("m", [], CPU, EvalSettings(tasks=["sciq"], task_data=[f"sciq={second}"]))
    assert "row 2" in str(caught.value)


def test_without_network_or_file_the_error_names_the_harness_settings_out(monkeypatch):
    monkeypatch.setattr(catalog.TaskManager, "load", _unreachable)
    with pytest.raises(DataError, match="--task-data triviaqa=FILE"):
        run_evaluation("m", [], CPU, EvalSettings(tasks=["triviaqa"]))


def _unreachable(*args):
    raise ConnectionError("Couldn't reach 'mandarjoshi/trivia_qa' on the Hub")


@pytest.mark.parametrize("size", [0, -1, "many"])
def test_a_batch_size_is_a_number_or_auto(size):
    with pytest.raises(ConfigError, match="batch"):
        build(EvalSettings, {"tasks": "popqa", "batch_size": size})


def test_there_must_be_something_to_measure():
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        run_evaluation("m", [], CPU, EvalSettings(tasks=["popqa"], no_base=True))
