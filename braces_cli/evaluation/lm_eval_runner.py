"""lm-eval as a library: build the selected tasks, check their rows, and score a model that is in memory.

`simple_evaluate` of lm-eval spends six seconds per call on information about the machine. So `lm_eval.evaluate` is
called here, after the other steps of `simple_evaluate` (seeds, few-shot settings) in the same order.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import chain
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from braces_cli.core.distributed import Processes
from braces_cli.core.errors import ConfigError, DataError, first_line
from braces_cli.core.models.generate import prompt_lengths
from braces_cli.core.models.load import Base
from braces_cli.core.models.tokenize import end_tokens
from braces_cli.core.progress import Report
from braces_cli.evaluation.catalog import Selection
from braces_cli.evaluation.native_tasks import TaskContext, halving, mean_metric
from braces_cli.evaluation.results import EMPTY, TRUNCATED, Metric, Scores
from braces_cli.evaluation.task_functions import COMMONSENSE_TASKS, commonsense_labels

# Raised by templates and functions of a task for a row without a field, or with a value of another type.
_ROW_ERRORS = (TemplateError, LookupError, TypeError, ValueError, AttributeError, AssertionError)


def load_tasks(
    selection: Selection, overrides: Path, files: dict[str, Path], base: str, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Build the selected tasks with their data, and read every document of tasks with a local file.

    Returns:
        Task or group of lm-eval -> `task_dict` of `lm_eval.evaluate`; each is measured and stored in one step.

    Args:
        overrides: folder of definitions that take precedence; the hub is used for tasks without one.
        files: task -> local file.
        base: name of the base, for tasks that build their own data.
        limit: number of documents that are measured.
    """
    units: dict[str, dict[str, Any]] = {}
    folders = [*selection.folders, overrides]
    manager = TaskManager(include_path=folders, include_defaults=False, metadata={"pretrained": base})
    for name in selection.names:
        try:
            # lm-eval and its tasks print, and stdout carries the result only.
            with redirect_stdout(StringIO()):
                units[name] = dict(manager.load([name]))
        except (SystemExit, Exception) as error:
            # A task is code of lm-eval that builds or downloads its data, and can raise anything.
            where, what = "--tasks", f"could not load the data set of task `{name}`"
            hint = f"Check the network, or give a local file: --task-data {name}=FILE."
            if (overrides / f"{name}.yaml").exists():
                where, what = "--task-data", f"{name} cannot read the rows"
                hint = "Give rows with the fields of the task's own data."
            raise DataError(f"{what}: {first_line(error, 300)}", where=where, hint=hint) from error
        for task_name, task in units[name]["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = f"`{task_name}` runs code that the model writes, or needs input other than text"
                raise ConfigError(what, where="--tasks", hint="Use lm-eval for it.")
            if task_name in files:
                _read_documents(task_name, task, files[task_name], limit)
    return units


def check_lengths(units: Mapping[str, dict[str, Any]], window: int) -> None:
    """Raise ConfigError if a task generates as many tokens as the context of the model has."""
    for unit in units.values():
        for name, task in unit["tasks"].items():
            options = task.get_config("generation_kwargs") if task.OUTPUT_TYPE == "generate_until" else None
            length = normalize_gen_kwargs(options, 0)["max_gen_toks"] if options else 0
            if length >= window:
                what = f"{name} generates {length} tokens, and the context of the model has {window}"
                raise ConfigError(what, where="--tasks", hint="Choose another task, or a model with a longer context.")


def _read_documents(name: str, task: Any, file: Path, limit: int | None) -> None:
    """Render every document, so that a row that the task cannot read fails before a model is loaded."""
    for number, doc in task.doc_iterator(limit=limit):
        try:
            task.doc_to_text(doc)
            task.doc_to_target(doc)
            if task.get_config("doc_to_choice") is not None:
                task.doc_to_choice(doc)
        except _ROW_ERRORS as error:
            what = f"{name} cannot read the row: {first_line(error, 300)}"
            hint = f"Found: {', '.join(map(str, doc))}."
            raise DataError(what, where=f"{file}, row {number + 1}", hint=hint) from error


class Model(HFLM):
    """HFLM on a model in memory, in one of several processes, with progress in a `Report` instead of lm-eval's bars."""

    batch_size_per_gpu: Any

    def __init__(self, base: Base, batch_size: str, stage: str, report: Report, processes: Processes) -> None:
        super().__init__(
            pretrained=base.model, tokenizer=base.tokenizer, batch_size=batch_size, trust_remote_code=False
        )
        self.stage, self._report = stage, report
        # Tokens that the model reads for a request -> number of those before the continuation.
        self._lengths: dict[tuple[int, ...], int] = {}
        # lm-eval shards by rank and world size of its model, and assumes one process for a model passed to it.
        self._processes = processes
        if processes.accelerator is not None:
            self.accelerator = processes.accelerator
        # (prompt, answer) -> the answer was cut off at the largest number of tokens.
        self.cut_off: dict[tuple[str, str], bool] = {}
        self._ends = end_tokens(base.model, base.tokenizer)
        # lm-eval reports each answer of a batch, in its order, to this hook.
        self._unreported: list[bool] = []
        self.cache_hook = SimpleNamespace(add_partial=self._note_answer)

    @property
    def rank(self) -> int:
        return self._processes.rank

    @property
    def world_size(self) -> int:
        return self._processes.size

    @property
    def max_gen_toks(self) -> int:
        """New tokens of tasks that do not set a number: lm-eval's 256, at most half of the context."""
        return min(super().max_gen_toks, self.max_length // 2)

    def _note_answer(self, kind: str, request: tuple[Any, ...], answer: Any) -> None:
        if kind == "generate_until":
            self.cut_off[request[0], answer] = self._unreported.pop(0)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._run("choices", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._run("texts", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._run("answers", requests, super().generate_until)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._lengths = {}
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :][:-1]
            self._lengths[tuple(ids)] = len(ids) + 1 - len(continuation)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths = [self._prompt_length(row) for row in inps.tolist()]
        with prompt_lengths(torch.tensor(lengths).unsqueeze(1)):
            return super()._model_call(inps, *args, **kwargs)

    def _prompt_length(self, row: list[int]) -> int:
        """Return the number of tokens of a padded row before its continuation; all of an unknown row."""
        end = len(row)
        while end > 1 and row[end - 1] == 0:  # lm-eval pads with zeros
            end -= 1
        ends = range(end, len(row) + 1)
        return next((self._lengths[key] for e in ends if (key := tuple(row[:e])) in self._lengths), len(row))

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        start = context.shape[1]
        with prompt_lengths(torch.tensor([[start]])):
            output = super()._model_generate(context, max_length, stop, **kwargs)
        for row in output[:, start:].tolist():
            text = self.tok_decode(row)
            ended = any(token in self._ends for token in row) or any(each in text for each in stop)
            self._unreported.append(not ended and len(row) == max_length - start)
        return output

    def _run(self, what: str, requests: list[Any], run: Callable[..., list[Any]]) -> list[Any]:
        """Call a method of HFLM, with a smaller batch each time memory runs out."""
        stage, total = f"{self.stage}, {what}", len(requests)
        automatic = self.batch_size_per_gpu == "auto"

        def attempt(size: int) -> list[Any]:
            # With `auto`, lm-eval searches for the largest size that fits, starting at this one, with forward passes.
            self.max_batch_size = size
            self.batch_size_per_gpu = "auto" if automatic else size
            self._unreported.clear()
            done = 0

            def count(module: Any, args: tuple, kwargs: dict) -> None:
                nonlocal done
                ids = args[0] if args else kwargs.get("input_ids")
                # Later steps of generation carry one token per row; their rows were counted with the prompts.
                if ids is not None and ids.ndim == 2 and ids.shape[1] > 1:
                    done = min(done + ids.shape[0], total)
                    self._report(stage, done, total)

            handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
            try:
                answers = run(requests, disable_tqdm=True)
            finally:
                handle.remove()
            self._report(stage, total, total)
            return answers

        first = self.max_batch_size if automatic else self.batch_size_per_gpu
        return halving(attempt, int(first or 1), stage)[0]


def measure(
    context: TaskContext, unit: dict[str, Any], steering: AbstractContextManager[Any], stage: str
) -> Scores | None:
    """Score the open model on a unit of tasks, steered by `steering`; None on every process but the first."""
    settings, processes = context.settings, context.processes
    tasks, seeds = unit["tasks"], settings.seeds
    random.seed(seeds["python"])
    np.random.seed(seeds["numpy"])
    torch.manual_seed(seeds["torch"])
    shots: dict[str, int] = {}
    for name, task in tasks.items():
        default = task.get_config("num_fewshot")
        # A task without examples by definition stays without.
        shots[name] = int(default or 0) if settings.num_fewshot is None or default == 0 else settings.num_fewshot
        task.set_config(key="num_fewshot", value=shots[name])
        task.set_fewshot_seed(seed=seeds["fewshot"])
    documents = [min(len(task.eval_docs), settings.limit or processes.size) for task in tasks.values()]
    if min(documents) < processes.size:
        # lm-eval cannot give a process no document, so the first process measures alone.
        if not processes.first:
            return None
        processes = Processes()
    with redirect_stdout(StringIO()), steering:
        model = Model(context.session.base, settings.batch_size, stage, context.report, processes)
        chat = {"apply_chat_template": context.chat, "fewshot_as_multiturn": context.chat}
        output = lm_eval.evaluate(lm=model, task_dict=unit, limit=settings.limit, log_samples=True, **chat)
    cut_off = dict(chain.from_iterable(each.items() for each in processes.gather(model.cut_off)))
    if not processes.first:
        return None
    sizes = model.batch_sizes.values() if model.batch_size_per_gpu == "auto" else [model.batch_size_per_gpu]
    scores = _scores(output, shots, sorted({int(size) for size in sizes}))
    for name, task in tasks.items():
        samples = list({sample["doc_id"]: sample for sample in output["samples"][name]}.values())
        metrics = scores.results.get(name, {})
        chance, majority = chance_levels(name, task, [sample["doc"] for sample in samples])
        for metric, entry in metrics.items():
            if metric.startswith("acc"):
                entry.chance, entry.majority = chance, majority
        if task.OUTPUT_TYPE == "generate_until":
            answers = [[(each["arguments"][0][0], text) for text in each["resps"][0]] for each in samples]
            metrics |= shares_of_answers(answers, cut_off)
    return scores


def shares_of_answers(
    documents: Sequence[Sequence[tuple[str, str]]], cut_off: Mapping[tuple[str, str], bool]
) -> dict[str, Metric]:
    """Return the shares of empty answers and of those that were cut off.

    Without values of documents: shares that only explain the scores must not enter the correction of p-values.

    Args:
        documents: for each document its (prompt, answer).
        cut_off: of each (prompt, answer).
    """
    shares = {
        EMPTY: [[float(not answer.strip()) for _, answer in each] for each in documents],
        TRUNCATED: [[float(cut_off[answer]) for answer in each] for each in documents],
    }
    return {name: replace(mean_metric(groups), documents={}, better=False) for name, groups in shares.items()}


def chance_levels(name: str, task: Any, docs: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Return the accuracy of a random choice, and of the most frequent label if the model writes a label."""
    if name in COMMONSENSE_TASKS:
        shares = [1 / len(labels) for labels in map(commonsense_labels, docs)]
        majority = Counter(doc["answer"] for doc in docs).most_common(1)[0][1] / len(docs)
        return sum(shares) / len(shares), majority
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, None
    shares = []
    for doc in docs:
        choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
        right = len(target) if isinstance(target, list) else 1
        if name == "truthfulqa_mc2":  # the probability of all right choices
            right = sum(doc["mc2_targets"]["labels"])
        shares.append(right / len(choices))
    return sum(shares) / len(shares), None


def _scores(output: Any, shots: dict[str, int], batch_sizes: list[int]) -> Scores:
    """Convert the output of `lm_eval.evaluate`."""
    scores = Scores(shots=shots, batch_sizes=batch_sizes, versions=output["versions"])
    labels: dict[tuple[str, str, str], str] = {}
    for task, entries in output["results"].items():
        metrics: dict[str, Metric] = {}
        for key, value in entries.items():
            metric, sign, chosen = key.rpartition(",")
            if not sign or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            # Without the name of lm-eval's filter, except for further filters of the same metric.
            label = metric if metric not in metrics else key
            labels[task, metric, chosen] = label
            error = entries.get(f"{metric}_stderr,{chosen}")
            stderr = float(error) if isinstance(error, Real) else None
            better = output["higher_is_better"].get(task, {}).get(metric)
            metrics[label] = Metric(float(value), stderr, int(entries["sample_len"]), better=better)
        if metrics:
            scores.results[task] = metrics
    for task, samples in output["samples"].items():
        for sample in samples:
            row = _sample(task, sample)
            for metric in sample["metrics"]:
                label, value = labels.get((task, metric, sample["filter"])), sample[metric]
                if label is not None and isinstance(value, Real):
                    scores.results[task][label].documents[sample["doc_id"]] = float(value)
                    row["scores"][label] = float(value)
            scores.samples.append(row)
    scores.samples.sort(key=lambda row: (row["task"], row["doc_id"], row["filter"]))
    return scores


def _sample(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the per-sample log without scores.

    `answer` is the generated text or the most likely choice; then `choices` has all of them with log-likelihoods.
    """
    arguments = sample["arguments"]
    prompts = [args[0] for args in arguments]
    row: dict[str, Any] = {"task": task}
    row |= {name: sample[name] for name in ("doc_id", "target", "filter")}
    row["prompt"] = prompts[0] if len(set(prompts)) == 1 else prompts
    answers = [each[0] for each in sample["resps"]]
    pairs = zip(answers, arguments, strict=True)
    if all(isinstance(answer, (tuple, list)) and len(args) > 1 for answer, args in pairs):
        # Choices differ in their continuation or, as in WinoGrande, in their context.
        texts = [args[1] if len(set(prompts)) == 1 else args[0] + args[1] for args in arguments]
        likely = [float(answer[0]) for answer in answers]
        row["answer"] = texts[max(range(len(likely)), key=likely.__getitem__)]
        row["choices"] = [{"text": text, "log_likelihood": value} for text, value in zip(texts, likely, strict=True)]
    else:
        row["answer"] = answers[0] if len(answers) == 1 else answers
    row["scores"] = {}
    return row
