"""lm-eval as a library: equal scores, the parts of lm-eval in use, batch sizes that do not fit into memory."""

import inspect
import json
import logging
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaForCausalLM

from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.distributed import Processes
from braces_cli.core.errors import BracesError, ConfigError
from braces_cli.core.models.load import load_base
from braces_cli.core.options import LoadOptions, Sampling
from braces_cli.core.progress import silent
from braces_cli.evaluation import catalog, lm_eval_runner
from braces_cli.evaluation.native_tasks import halving
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.scoring.likelihood import continuation_likelihoods
from braces_cli.steering.texts import generate_texts, text_requests
from tests.evaluation.conftest import evaluate, popqa_rows

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
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}


def _direct(folder: Path, name: str, file: Path, limit: int, shots: int | None, tmp_path: Path):
    """Run lm-eval alone: model by name, the YAML of the task, and `datasets` reading the file."""
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
    result = evaluate(str(folder), [], settings)
    monkeypatch.undo()
    return result, seen[0]


# Rows in the schema of the data set on the hub, for tasks without a file in ../shared.
ROWS = {
    "nq_open": [{"question": f"who is number {i}", "answer": ["No one", chr(97 + i)]} for i in range(5)],
    "arc_easy": [
        {"question": f"Which is {i}?", "choices": {"text": [f"the {i}", "none", "all of it"], "label": list("ABC")},
         "answerKey": "ABC"[i % 3]} for i in range(5)
    ],
    "winogrande": [
        {"sentence": f"The {i} did not fit the box because _ was too big.", "option1": "the box", "option2": f"the {i}",
         "answer": "12"[i % 2]} for i in range(5)
    ],
    "hellaswag": [
        {"activity_label": "Jumping", "ctx_a": f"The boy {i} jumps.", "ctx_b": "he", "label": str(i % 2),
         "endings": ["lands on [a] mat.", f"flies {i} times.", "stops.", "goes on."]} for i in range(5)
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "shots"), [*((name, None) for name in (*FILES, *ROWS)), ("triviaqa", 1)])
def test_scores_equal_those_of_lm_eval_document_by_document(
    shared, tiny_folder, write_jsonl, tmp_path, monkeypatch, name, shots
):
    folder, limit = shared / "models" / "stories260K" if name in FILES else tiny_folder, 4
    file = shared / "data" / FILES[name] if name in FILES else write_jsonl(f"{name}.jsonl", ROWS[name])
    result, found = _ours(folder, [name], [f"{name}={file}"], limit, shots, monkeypatch)
    expected = _direct(folder, name, file, limit, shots, tmp_path)
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
            stderr = expected["results"][name][key.replace(",", "_stderr,")]
            entry = result["systems"][0]["results"][name][metric]
            chance = {}
            if len(ours[0]["arguments"]) > 1:
                labels = [each["doc"]["mc2_targets"]["labels"] if name == "truthfulqa_mc2" else [1] for each in ours]
                levels = [sum(right) / len(each["arguments"]) for right, each in zip(labels, ours, strict=True)]
                chance = {"chance": sum(levels) / limit}
            assert entry == pytest.approx({"value": value, "stderr": stderr, "n": limit, **chance}, abs=1e-9)


@pytest.mark.parametrize("batch_size", ["1", "3", "auto"])
def test_empty_answers_and_answers_without_an_end_are_counted(
    tiny_folder, write_jsonl, monkeypatch, caplog, batch_size
):
    """A row that has ended goes on as long as others of its batch do."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    answers = ["", "x" * 20, "yes\n" + "x" * 20, " \nno" + "x" * 20, "yes"]

    def generate(self, input_ids, max_length, **options):
        asked = [int(re.findall(r"What is (\d)", tokenizer.decode(row))[-1]) for row in input_ids]
        rows = [[*tokenizer(answers[i], add_special_tokens=False)["input_ids"], *[1] * 20] for i in asked]
        return torch.cat([input_ids, torch.tensor([row[:15] for row in rows])], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="braces")
    data = (f"popqa={write_jsonl('p.jsonl', popqa_rows(5))}",)
    settings = EvalSettings(tasks=("popqa",), task_data=data, batch_size=batch_size, fail_under=("popqa:empty=1",))
    found = evaluate(str(tiny_folder), [], settings)
    shares = found["systems"][0]["results"]["popqa"]
    assert (shares["empty"]["value"], shares["truncated"]["value"]) == (0.4, 0.2)
    assert shares["empty"] == pytest.approx({"value": 0.4, "stderr": (0.4 * 0.6 / 4) ** 0.5, "n": 5})
    assert "popqa: empty answers: base 40%; to avoid them, show answers" in caplog.text
    assert "popqa: answers cut off: base 20%" in caplog.text


def test_new_tokens_that_do_not_fit_the_context(tiny_folder, write_jsonl, tmp_path):
    """Without a number of the task lm-eval's 256 are shortened; a task's number is not changed."""
    folder, rows = shutil.copytree(tiny_folder, tmp_path / "short"), popqa_rows(2)
    for row in rows:
        row["answer"] = {"aliases": ["a"], "value": "a"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    file = write_jsonl("rows.jsonl", rows)
    data = (f"triviaqa={file}", f"popqa={file}")
    result = evaluate(str(folder), [], EvalSettings(tasks=("triviaqa",), task_data=data[:1]))
    assert result["systems"][0]["results"]["triviaqa"]["truncated"]["n"] == 2
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 15}))
    with pytest.raises(ConfigError, match="popqa generates 15 tokens, and the context of the model has 15"):
        evaluate(str(folder), [], EvalSettings(tasks=("popqa",), task_data=data[1:]))


@pytest.mark.parametrize("name", ["popqa", "mmlu_anatomy"])  # the second has its examples in another split
def test_a_document_is_never_an_example_of_itself(tiny_folder, write_jsonl, monkeypatch, name):
    rows = [{**row, "choices": ["a", "b", "c", "d"], "answer": 1} for row in popqa_rows(4)]
    _, found = _ours(tiny_folder, [name], [f"{name}={write_jsonl('p.jsonl', rows)}"], 4, 3, monkeypatch)
    for sample in found["samples"][name]:
        prompt = sample["arguments"][0][0]
        assert prompt.count("What is ") == 4
        assert prompt.count(sample["doc"]["question"]) == 1


def test_popqa_uses_the_prompt_of_its_authors(tiny_folder, write_jsonl, monkeypatch):
    _, found = _ours(tiny_folder, ["popqa"], [f"popqa={write_jsonl('p.jsonl', popqa_rows(1))}"], 1, None, monkeypatch)
    prompt, settings = found["samples"]["popqa"][0]["arguments"][0]
    assert prompt == "Q: What is 0? A:"
    assert (settings["max_gen_toks"], settings["until"], settings["do_sample"]) == (15, ["\n"], False)


def test_a_batch_that_does_not_fit_is_halved(tiny_folder, write_jsonl, monkeypatch, caplog):
    data = [
        f"popqa={write_jsonl('p.jsonl', popqa_rows(4))}",
        f"arc_easy={write_jsonl('t.jsonl', ROWS['arc_easy'])}",
        f"perplexity={write_jsonl('x.jsonl', [{'text': f'text {i}'} for i in range(5)])}",
    ]
    names = ["popqa,arc_easy,perplexity"]
    small = evaluate(str(tiny_folder), [], EvalSettings(tasks=names, task_data=data, batch_size="2"))
    forward = LlamaForCausalLM.forward

    def short_of_memory(self, *args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate all there is")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", short_of_memory)
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="braces"):
        found = evaluate(str(tiny_folder), [], EvalSettings(tasks=names, task_data=data, batch_size="8"))
    assert found["systems"] == small["systems"]
    assert found["settings"]["batch_size"] == 2
    messages = {record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()}
    assert "base, popqa, answers: out of memory with 8 sequences a pass, going on with 4" in messages
    assert len(messages) == 6


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [(torch.OutOfMemoryError("CUDA out of memory. x"), BracesError, "one sequence at a time"),
     (RuntimeError("shapes do not match"), RuntimeError, "shapes")],
)  # fmt: skip
def test_an_error_with_a_single_sequence_is_raised(error, expected, words):
    with pytest.raises(expected, match=words):
        halving(Mock(side_effect=error), 4, "stage")


@pytest.mark.parametrize("scope", ["prompt", "generated"])
def test_scope_in_tasks_of_lm_eval(tiny_folder, scope):
    """Log-likelihoods and answers of a batch with other lengths against those of braces; token 0 pads the rows."""
    session = open_session(str(tiny_folder), None, LoadOptions(device="cpu"))
    terms = [(find_attribute(session, "positive", None), 40.0)]
    pairs = [("the film", " is good"), ("a", "b"), ("an old town", " and<s>"), ("a day", " or<s> "), ("the end", "<s>")]
    prompts, options = ["the film", "a", "an old town"], {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}
    with steered(session, terms, scope=scope):
        model = lm_eval_runner.Model(session.base, "5", "stage", silent, Processes())
        scored = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
        answers = model.generate_until([Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts])
        nll = [each.nll for each in continuation_likelihoods(session.base, pairs, 5)]
        texts = list(generate_texts(session, text_requests(prompts), Sampling(6, temperature=0), batch_size=3))
    assert [-value for value, _ in scored] == pytest.approx(nll, rel=1e-4)
    assert answers == texts


def test_lm_eval_reads_rank_and_size_of_the_processes(tiny_folder):
    """lm-eval reads both as properties, never their private fields."""
    base = load_base(str(tiny_folder), LoadOptions(device="cpu"))
    processes = Processes(1, 3, accelerator="accelerate")
    model = lm_eval_runner.Model(base, "2", "stage", silent, processes)
    assert (model.rank, model.world_size, model.accelerator) == (1, 3, "accelerate")
    for name in ("rank", "world_size"):
        assert isinstance(inspect.getattr_static(HFLM, name), property)
    for line in inspect.getsource(HFLM).splitlines():
        assert not re.search(r"self\._(rank|world_size)(?! = )", line) or "return" in line, line
