"""A killed run goes on where it was, out of memory is no end, and every document can be looked at."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from braces_cli.core.errors import BracesError, ConfigError
from braces_cli.core.options import LoadOptions
from braces_cli.evaluation import catalog, lm_eval_runner
from braces_cli.evaluation import run as run_module
from braces_cli.evaluation.native_tasks import halving
from braces_cli.evaluation.results import Store, check_folder
from braces_cli.evaluation.run import run_evaluation
from braces_cli.evaluation.settings import EvalSettings

CPU = LoadOptions(device="cpu")
TARGETS = {"choices": ["yes", "no way", "perhaps"], "labels": [1, 0, 0]}


@pytest.fixture
def data(write_jsonl):
    popqa = [{"question": f"What is {i}?", "possible_answers": '["a"]'} for i in range(4)]
    truthful = [{"question": f"Is it {i}?", "mc1_targets": TARGETS} for i in range(4)]
    return [f"popqa={write_jsonl('p.jsonl', popqa)}", f"truthfulqa_mc1={write_jsonl('t.jsonl', truthful)}"]


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(tiny_folder, make_adapter, data, tmp_path, monkeypatch):
    adapters = [str(make_adapter(tiny_folder))]
    settings = EvalSettings(tasks=["popqa,truthfulqa_mc1"], task_data=data)
    whole = run_evaluation(str(tiny_folder), adapters, CPU, settings)

    measured: list[str] = []
    measure = lm_eval_runner.measure

    def dying(context, unit, steering, stage):
        if len(measured) == 3:
            raise Killed
        measured.append(stage)
        return measure(context, unit, steering, stage)

    monkeypatch.setattr(lm_eval_runner, "measure", dying)
    store = Store(tmp_path / "out", log_samples=True)
    with pytest.raises(Killed):
        run_evaluation(str(tiny_folder), adapters, CPU, settings, store=store)
    assert measured == ["seed0, popqa", "seed0, truthfulqa_mc1", "base, popqa"]
    monkeypatch.setattr(lm_eval_runner, "measure", measure)
    monkeypatch.setattr(run_module.lm_eval_runner, "measure", lambda *a: measured.append(a[-1]) or measure(*a))
    again = run_evaluation(str(tiny_folder), adapters, CPU, settings, store=store, resume=True)
    assert measured[3:] == ["base, truthfulqa_mc1"]
    assert again == whole

    # The result itself is written by the command line; with it there, nothing is left to do.
    (tmp_path / "out" / "results.json").write_text(json.dumps(again))
    monkeypatch.setattr(run_module, "open_session", lambda *a: pytest.fail("loaded"))
    assert run_evaluation(str(tiny_folder), adapters, CPU, settings, store=store, resume=True) == whole
    other = EvalSettings(tasks=["popqa,truthfulqa_mc1"], task_data=data, limit=3)
    with pytest.raises(ConfigError, match=r"has other settings \(limit\)"):
        run_evaluation(str(tiny_folder), adapters, CPU, other, store=store, resume=True)

    rows = [json.loads(line) for line in (tmp_path / "out/samples/seed0/truthfulqa_mc1.jsonl").read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1, 2, 3]
    for number, row in enumerate(rows):
        assert row["prompt"].endswith(f"Q: Is it {number}?\nA:")
        assert [choice["text"] for choice in row["choices"]] == [f" {text}" for text in TARGETS["choices"]]
        assert row["answer"] == max(row["choices"], key=lambda choice: choice["log_likelihood"])["text"]
        assert row["scores"] == {"acc": float(row["answer"] == " yes")}


def test_a_batch_that_does_not_fit_is_halved(tiny_folder, data, write_jsonl, monkeypatch, caplog):
    data = [*data, f"perplexity={write_jsonl('x.jsonl', [{'text': f'text {i}'} for i in range(5)])}"]
    names = ["popqa,truthfulqa_mc1,perplexity"]
    small = run_evaluation(str(tiny_folder), [], CPU, EvalSettings(tasks=names, task_data=data, batch_size="2"))
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def short_of_memory(self, *args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate all there is")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", short_of_memory)
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="braces"):
        found = run_evaluation(str(tiny_folder), [], CPU, EvalSettings(tasks=names, task_data=data, batch_size="8"))
    assert found["systems"] == small["systems"]
    assert found["settings"]["batch_size"] == 2
    said = {record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()}
    assert "base, popqa, answers: out of memory with 8 sequences a pass, going on with 4" in said
    assert len(said) == 6


def test_one_sequence_that_does_not_fit_is_an_end():
    def never(size):
        raise torch.OutOfMemoryError("CUDA out of memory. x")

    with pytest.raises(BracesError, match="one sequence at a time"):
        halving(never, 4, "stage")

    def wrong(size):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        halving(wrong, 4, "stage")


def test_prompts_go_into_the_chat_template_where_asked(tiny_folder, data, tmp_path):
    from transformers import AutoTokenizer

    with pytest.raises(ConfigError, match="no chat template"):
        run_evaluation(
            str(tiny_folder), [], CPU, EvalSettings(tasks=["popqa"], task_data=data[:1], apply_chat_template=True)
        )
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    prompts = {}
    for on in (None, True):
        store = Store(tmp_path / f"out{on}", log_samples=True)
        settings = EvalSettings(tasks=["popqa"], task_data=data[:1], limit=1, num_fewshot=1, apply_chat_template=on)
        result = run_evaluation(str(folder), [], CPU, settings, store=store)
        assert result["settings"]["apply_chat_template"] is bool(on)
        prompts[on] = json.loads((store.folder / "samples/base/popqa.jsonl").read_text())["prompt"]
    assert prompts[None].count("Q: What is") == 2
    assert prompts[True].count("[user]Q: What is") == 2
    assert "[assistant]" in prompts[True]
    assert prompts[True].endswith("Q: What is 0? A:[A]")


@pytest.mark.parametrize("options", [{"resume": True}, {"log_samples": True}])
def test_what_is_stored_needs_a_folder(options):
    with pytest.raises(ConfigError, match="no output folder"):
        check_folder(None, **{"overwrite": False, "resume": False, "log_samples": False, **options})


def test_a_native_task_is_registered_by_its_name():
    assert set(catalog.NATIVE_TASKS) >= {"perplexity"}
    assert all(task.name == name and task.metrics for name, task in catalog.NATIVE_TASKS.items())
