"""Whole evaluations on small models: systems side by side, resuming, early errors, thresholds."""

import json
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.evaluation import catalog, lm_eval_runner
from braces_cli.evaluation import run as run_module
from braces_cli.evaluation.run import check_reached
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.tables import markdown, result_tables
from braces_cli.evaluation.task_functions import COMMONSENSE_TASKS
from tests.evaluation.conftest import evaluate, popqa_rows

TARGETS = {"choices": ["yes", "no way", "perhaps"], "labels": [1, 0, 0]}

ARC = [
    {"question": f"Which is {i}?", "choices": {"text": [f"the {i}", "none", "all of it"], "label": list("ABC")},
     "answerKey": "ABC"[i % 3]} for i in range(6)
]  # fmt: skip

STEERED = {"attribute": ("positive",), "s": ("-20,0,20",)}


@pytest.fixture
def asked(write_jsonl, tmp_path):
    """Settings of an evaluation on a multiple-choice task of lm-eval and a task of braces."""
    text = tmp_path / "t.txt"
    text.write_text("A first line.\nAnd a second, longer one.\nA third.\n")
    data = (f"arc_easy={write_jsonl('arc.jsonl', ARC)}", f"perplexity={text}")

    def settings(**more) -> EvalSettings:
        return EvalSettings(tasks=("arc_easy,perplexity",), task_data=data, **more)

    return settings


@pytest.fixture
def data(write_jsonl):
    truthful = [{"question": f"Is it {i}?", "mc1_targets": TARGETS} for i in range(4)]
    return [f"popqa={write_jsonl('p.jsonl', popqa_rows(4))}", f"truthfulqa_mc1={write_jsonl('t.jsonl', truthful)}"]


class Killed(BaseException):
    pass


def test_base_and_adapters_are_compared(tiny_folder, make_adapter, write_jsonl, tmp_path):
    adapters = [str(make_adapter(tiny_folder, seed)) for seed in (0, 1)]
    text = tmp_path / "t.txt"
    text.write_text("A first line.\nAnd a second, longer one.\n")
    data = [f"popqa={write_jsonl('p.jsonl', popqa_rows(6))}", f"perplexity={text}"]
    settings = EvalSettings(tasks=["popqa,perplexity"], task_data=data, limit=5)
    result = evaluate(None, adapters, settings)
    assert [s["adapter"] for s in result["systems"]] == [None, *adapters]
    assert [s["name"] for s in result["systems"]] == ["base", "seed0", "seed1"]
    assert {s["model"] for s in result["systems"]} == {str(tiny_folder)}
    bits = [s["results"]["perplexity"]["bits_per_byte"]["value"] for s in result["systems"]]
    assert len(set(bits)) == 3
    assert result["systems"][0]["results"]["popqa"]["acc"]["n"] == 5
    pairs = {(c["task"], c["metric"], c["from"], c["to"]) for c in result["comparisons"]}
    assert len(pairs) == len(result["comparisons"]) == 3 * (4 + 4)
    row = next(c for c in result["comparisons"] if (c["metric"], c["to"]) == ("bits_per_byte", "seed1"))
    assert row["difference"] == bits[2] - bits[0]
    bare = evaluate(str(tiny_folder), [], settings)
    assert bare["systems"][0]["results"] == result["systems"][0]["results"]
    alone = evaluate(None, adapters[1:], settings, no_base=True)
    assert [s["results"] for s in alone["systems"]] == [result["systems"][2]["results"]]
    assert alone["comparisons"] == []


def test_a_changed_file_is_read_again(tiny_folder, write_jsonl):
    settings = EvalSettings(tasks=["popqa"], task_data=[f"popqa={write_jsonl('p.jsonl', popqa_rows(3))}"])
    assert evaluate(str(tiny_folder), [], settings)["systems"][0]["results"]["popqa"]["acc"]["n"] == 3
    write_jsonl("p.jsonl", popqa_rows(4))
    assert evaluate(str(tiny_folder), [], settings)["systems"][0]["results"]["popqa"]["acc"]["n"] == 4


def test_strength_zero_is_no_attribute_and_is_measured_once(tiny_folder, asked, tmp_path, monkeypatch):
    """Document by document, in the log of samples too."""
    out, stages, measure = tmp_path / "out", [], lm_eval_runner.measure
    monkeypatch.setattr(lm_eval_runner, "measure", lambda *args: stages.append(args[-1]) or measure(*args))
    settings = asked(**STEERED, fail_under=("perplexity:token_perplexity=1e9",))
    result = evaluate(str(tiny_folder), [], settings, output_dir=out, log_samples=True)
    names = ["base", "base, positive -20", "base, positive +0", "base, positive +20"]
    assert [system["name"] for system in result["systems"]] == names
    assert [system["attributes"] for system in result["systems"]] == [{}, *({"positive": s} for s in (-20, 0, 20))]
    bare, low, zero, high = (system["results"] for system in result["systems"])
    assert zero == bare
    assert stages == [f"{name}, arc_easy" for name in (names[0], names[1], names[3])]
    assert len({each["perplexity"]["bits_per_byte"]["value"] for each in (bare, low, high)}) == 3
    logs = {}
    for folder in (out / "samples").iterdir():
        rows = [json.loads(line) for task in sorted(folder.iterdir()) for line in task.read_text().splitlines()]
        logs[rows[0]["system"]] = [{**row, "system": ""} for row in rows]
    assert logs["base, positive +0"] == logs["base"] != logs["base, positive +20"]
    assert {(row["from"], row["to"]) for row in result["comparisons"]} == {("base", name) for name in names[1:]}
    same = [row for row in result["comparisons"] if row["to"] == "base, positive +0"]
    assert {(row["p_value"], row["difference"]) for row in same} == {(1, 0)}
    assert [(row["system"], row["reached"]) for row in result["fail_under"]] == [(name, True) for name in names[1:]]
    _, columns, rows = result_tables(result)[0]
    assert [row[columns.index("system")] for row in rows[:4]] == names
    assert "steered by: positive" in markdown(result)
    assert result["settings"]["attributes"] == {"positive": [-20.0, 0.0, 20.0]}
    resumed = {"output_dir": out, "log_samples": True, "resume": True}
    assert evaluate(str(tiny_folder), [], settings, **resumed) == result
    with pytest.raises(ConfigError, match=r"has other settings \(steering"):
        evaluate(str(tiny_folder), [], asked(attribute=("positive",), s=("-20,20",)), **resumed)


def test_each_adapter_is_compared_with_itself_steered(tiny_folder, make_adapter, asked):
    """With adapters the base is not steered; strengths are not compared with each other."""
    adapter = str(make_adapter(tiny_folder))
    result = evaluate(None, [adapter], asked(attribute=("positive", "toxic"), s=("-2,2", "1")))
    low, high = "seed0, positive -2 toxic +1", "seed0, positive +2 toxic +1"
    assert [system["name"] for system in result["systems"]] == ["base", "seed0", low, high]
    assert [system["adapter"] for system in result["systems"]] == [None, adapter, adapter, adapter]
    pairs = {(row["from"], row["to"]) for row in result["comparisons"]}
    assert pairs == {("base", "seed0"), ("base", low), ("base", high), ("seed0", low), ("seed0", high)}
    title, columns, rows = result_tables(result)[1]
    assert title.endswith(", from seed0")
    assert {row[columns.index("to")] for row in rows} == {low, high}
    plain = evaluate(None, [adapter], asked())
    assert [system["results"] for system in plain["systems"]] == [each["results"] for each in result["systems"][:2]]


def test_a_killed_run_is_resumed(tiny_folder, make_adapter, data, tmp_path, monkeypatch):
    adapters = [str(make_adapter(tiny_folder))]
    settings = EvalSettings(tasks=["popqa,truthfulqa_mc1"], task_data=data)
    whole = evaluate(str(tiny_folder), adapters, settings)

    measured: list[str] = []
    measure = lm_eval_runner.measure

    def dying(context, unit, steering, stage):
        if len(measured) == 3:
            raise Killed
        measured.append(stage)
        return measure(context, unit, steering, stage)

    monkeypatch.setattr(lm_eval_runner, "measure", dying)
    stored = {"output_dir": tmp_path / "out", "log_samples": True}
    with pytest.raises(Killed):
        evaluate(str(tiny_folder), adapters, settings, **stored)
    assert measured == ["seed0, popqa", "seed0, truthfulqa_mc1", "base, popqa"]
    monkeypatch.setattr(lm_eval_runner, "measure", measure)
    monkeypatch.setattr(run_module.lm_eval_runner, "measure", lambda *a: measured.append(a[-1]) or measure(*a))
    again = evaluate(str(tiny_folder), adapters, settings, **stored, resume=True)
    assert measured[3:] == ["base, truthfulqa_mc1"]
    assert again == whole

    # A finished run is not measured again.
    assert evaluate(str(tiny_folder), adapters, settings, **stored, resume=True) == whole
    assert len(measured) == 4
    other = EvalSettings(tasks=["popqa,truthfulqa_mc1"], task_data=data, limit=3)
    with pytest.raises(ConfigError, match=r"has other settings \(limit\)"):
        evaluate(str(tiny_folder), adapters, other, **stored, resume=True)

    rows = [json.loads(line) for line in (tmp_path / "out/samples/seed0/truthfulqa_mc1.jsonl").read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1, 2, 3]
    for number, row in enumerate(rows):
        assert row["prompt"].endswith(f"Q: Is it {number}?\nA:")
        assert [choice["text"] for choice in row["choices"]] == [f" {text}" for text in TARGETS["choices"]]
        assert row["answer"] == max(row["choices"], key=lambda choice: choice["log_likelihood"])["text"]
        assert row["scores"] == {"acc": float(row["answer"] == " yes")}


def test_the_chat_template_is_applied(tiny_folder, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="braces")

    def settings(**more):
        return EvalSettings(tasks=["popqa"], task_data=data[:1], limit=1, num_fewshot=1, **more)

    with pytest.raises(ConfigError, match="no chat template"):
        evaluate(str(tiny_folder), [], settings(apply_chat_template=True))
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    prompts = {}
    for on in (None, True):
        out = tmp_path / f"out{on}"
        caplog.clear()
        result = evaluate(str(folder), [], settings(apply_chat_template=on), output_dir=out, log_samples=True)
        assert ("needs --apply-chat-template" in caplog.text) is (on is None)
        assert result["settings"]["apply_chat_template"] is bool(on)
        prompts[on] = json.loads((out / "samples/base/popqa.jsonl").read_text())["prompt"]
    assert prompts[None].count("Q: What is") == 2
    assert prompts[True].count("[user]Q: What is") == 2
    assert "[assistant]" in prompts[True]
    assert prompts[True].endswith("Q: What is 0? A:[A]")


@pytest.mark.parametrize(
    ("trained", "setting", "expected"),
    [((True, None), None, True), ((False, None), None, False), ((None,), None, False), ((), None, False),
     ((True, False), False, False)],
)  # fmt: skip
def test_the_training_of_adapters_decides_on_the_chat_template(trained, setting, expected):
    session = SimpleNamespace(base=SimpleNamespace(tokenizer=SimpleNamespace(chat_template="{{ x }}")), config=None)
    adapters = [SimpleNamespace(chat_template=each) for each in trained]
    settings = EvalSettings(apply_chat_template=setting)
    assert run_module._uses_chat_template(settings, adapters, session) is expected
    if len(set(trained)) > 1 and setting is not None:
        with pytest.raises(ConfigError, match="with the chat template and another without"):
            run_module._uses_chat_template(EvalSettings(), adapters, session)


def test_one_chat_template_for_all_systems():
    """That of the adapters, or with several of the option, which also turns the template on."""
    one, other = (SimpleNamespace(stored=SimpleNamespace(config=SimpleNamespace(chat_template=t))) for t in "ab")
    assert run_module._template(EvalSettings(), [one, one, SimpleNamespace(stored=None)]) == "a"
    with pytest.raises(ConfigError, match="different chat templates"):
        run_module._template(EvalSettings(), [one, other])
    settings = EvalSettings(system_prompt="x")
    assert (settings.uses_template, EvalSettings().uses_template) == (True, None)


def test_what_does_not_fit_fails_before_anything_is_measured(tiny_folder, make_adapter, asked, tmp_path, monkeypatch):
    """An adapter of another base, and an unknown attribute."""
    monkeypatch.setattr(run_module, "_measure", lambda *a: pytest.fail("measured"))
    good = make_adapter(tiny_folder)
    bad = shutil.copytree(good, tmp_path / "bad")
    tensors = load_file(bad / "adapter_model.safetensors")
    tensors["layers.0.base_samples"] *= 2
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="another base"):
        evaluate(str(tiny_folder), [str(good), str(bad)], asked())
    with pytest.raises(ConfigError, match="unknown attribute `positve`"):
        evaluate(str(tiny_folder), [], asked(attribute=("positve",)))


def test_without_network_the_error_names_task_data(monkeypatch):
    def _unreachable(*args):
        raise ConnectionError("Couldn't reach 'mandarjoshi/trivia_qa' on the Hub")

    monkeypatch.setattr(catalog.TaskManager, "load", _unreachable)
    with pytest.raises(DataError, match="--task-data triviaqa=FILE"):
        evaluate("m", [], EvalSettings(tasks=["triviaqa"]))


def test_a_threshold_depends_on_which_values_are_better():
    def system(name, adapter, acc, ppl):
        metrics = {"t": {"acc": {"value": acc}}, "p": {"ppl": {"value": ppl}}}
        return {"name": name, "adapter": adapter, "results": metrics}

    systems = [system("base", None, 0.9, 9.0), system("a", "a", 0.5, 20.0), system("b", "b", 0.4, math.nan)]
    result = {"systems": systems, "settings": {"higher_is_better": {"t": {"acc": True}, "p": {"ppl": False}}}}
    thresholds = [("t", "acc", 0.5), ("p", "ppl", 20.0), ("t", "none", 0.0)]
    reached = [(row["system"], row["metric"], row["reached"]) for row in check_reached(thresholds, result)]
    assert reached == [
        ("a", "acc", True), ("b", "acc", False), ("a", "ppl", True), ("b", "ppl", False), ("a", "none", False),
        ("b", "none", False),
    ]  # fmt: skip
    # The base is compared if it is the only system.
    alone = check_reached(thresholds, {**result, "systems": systems[:1]})
    assert [(row["system"], row["reached"]) for row in alone] == [("base", True), ("base", True), ("base", False)]


def test_the_commonsense_tasks_are_averaged(tiny_folder, write_jsonl, tmp_path):
    rows = [{"instruction": f"Is it {i}? true/false", "input": "", "output": "x", "answer": "true"} for i in range(2)]
    file = write_jsonl("rows.jsonl", rows)
    settings = EvalSettings(tasks=["commonsense_gen"], task_data=[f"commonsense_gen={file}"])
    result = evaluate(str(tiny_folder), [], settings, output_dir=tmp_path / "out", log_samples=True)
    found = result["systems"][0]["results"]
    assert list(found) == [*COMMONSENSE_TASKS, "commonsense_gen"]
    assert found["commonsense_gen"]["braces_average"]["n"] == 16
    assert found["commonsense_gen"]["braces_average"]["chance"] == 0.5
    about = {name: found["commonsense_gen_piqa"]["acc"][name] for name in ("chance", "majority")}
    assert about == {"chance": 0.5, "majority": 1.0}
    assert found["commonsense_gen_piqa"]["answered"]["value"] < 1
    sample = json.loads((tmp_path / "out/samples/base/commonsense_gen_piqa.jsonl").read_text().splitlines()[1])
    assert sample["prompt"] == "### Instruction:\nIs it 1? true/false\n\n### Response:\n"


def test_the_embedded_tasks_run(braces):
    outcome = braces("eval", "--tasks", "embedded", "--limit", 40, "--format", "json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    results = outcome.json["systems"][0]["results"]
    assert results["embedded_popqa"]["acc"]["n"] == 40
    assert results["embedded_popqa"]["acc"]["value"] < 0.6
    assert 0 <= results["embedded_truthful"]["acc"]["value"] < 0.6
    assert "Custom kwargs" not in outcome.err
