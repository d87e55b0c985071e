"""Tasks that braces measures itself, without lm-eval, on rows of the user: `perplexity`, `answers`, `detection`.

perplexity  word_perplexity = exp(nll / words)     words as lm-eval counts them: separated by white space
            byte_perplexity = exp(nll / bytes)     bytes of the UTF-8 text
            bits_per_byte = nll / bytes / ln 2
            token_perplexity = exp(nll / tokens)   depends on the tokenizer; not for comparing models
            Each document follows exactly one start token. Documents are plain texts: no chat template is applied.
answers     log_odds = ln P(positive answer | prompt) - ln P(negative answer | prompt), of whole answers;
            probability = sigmoid(log_odds); prefers_positive: log_odds > 0
detection   auroc: probability that a random text with the attribute scores higher than a random one without. The
            score of a text at a layer is the largest projection of a token's FFN input on the attribute's p. The layer
            is chosen on half of the texts and measured on the other half. The model is not steered.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.directions import area
from braces_cli.core.attributes.pooling import Watch, pooled_batches, text_rows
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.distributed import Processes
from braces_cli.core.errors import BracesError, DataError, logger
from braces_cli.core.models.tokenize import context_length
from braces_cli.core.progress import Report, silent
from braces_cli.data.rows import read_rows, read_texts
from braces_cli.evaluation.results import Metric, Scores
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.statistics import Z, cluster_error, rate_error
from braces_cli.scoring.likelihood import Likelihood, continuation_likelihoods, safe_exp, text_likelihoods

T = TypeVar("T")


@dataclass(frozen=True)
class TaskContext:
    """Everything that measuring a task needs except its documents; the same for every system.

    Attributes:
        session: open base with the adapter that is measured; PEFT adapters are not in `session.adapter`.
        chat: apply the chat template to prompts.
        attributes: all attributes of the run.
    """

    session: Session
    settings: EvalSettings
    chat: bool
    attributes: Sequence[Attribute]
    processes: Processes
    report: Report = silent

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass of tasks of braces, before halving; 8 for `auto`, which is for lm-eval."""
        return 8 if self.settings.batch_size == "auto" else int(self.settings.batch_size)


# Scores the model on a task. Arguments: what steers the model while it is entered, and the name of the progress bar.
# Only the first process needs to return scores.
Measure = Callable[[AbstractContextManager[Any], str], Scores | None]


@dataclass(frozen=True)
class NativeTask:
    """A task that braces measures itself.

    Attributes:
        read: reads the documents of a data file.
        prepare: (context, documents) -> what measures a system; called once per run.
        metrics: metric -> whether a larger value is better, in the order of tables.
        data: content of the data file, for the hint if it is missing.
    """

    name: str
    read: Callable[[Path], Sequence[Any]]
    prepare: Callable[[TaskContext, Sequence[Any]], Measure]
    metrics: dict[str, bool]
    data: str


def task_scores(
    task: NativeTask, metrics: dict[str, Metric], samples: Sequence[dict[str, Any]], batch_size: int
) -> Scores:
    """Return the scores of a task of braces; `samples` holds `prompt` and `answer` of each document."""
    for name, metric in metrics.items():
        metric.better = task.metrics.get(name)
    rows = []
    for index, sample in enumerate(samples):
        values = {name: metric.documents[index] for name, metric in metrics.items() if index in metric.documents}
        rows.append({"task": task.name, "doc_id": index, **sample, "scores": values})
    return Scores({task.name: metrics}, batch_sizes=[batch_size], samples=rows)


def halving(work: Callable[[int], T], size: int, stage: str) -> tuple[T, int]:
    """Call `work` with a batch size, halved each time memory runs out; return its result and the size that fitted."""
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if size == 1:
                hint = "Load the base in fewer bits (--dtype bfloat16, --quantize bnb-4bit) or on several devices."
                raise BracesError("out of memory with one sequence at a time", where=stage, hint=hint) from error
        # After the except clause, whose traceback holds references to the tensors that did not fit.
        clear_device_cache(garbage_collection=True)
        logger.warning("%s: out of memory with %d sequences a pass, going on with %d", stage, size, size // 2)
        size //= 2


# metric -> its units
_PERPLEXITIES = {
    "word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes", "token_perplexity": "tokens"
}  # fmt: skip


def _perplexity(context: TaskContext, texts: Sequence[str]) -> Measure:
    base, processes = context.session.base, context.processes
    window = context_length(base.model.config, base.tokenizer)

    def measure(steering: AbstractContextManager[Any], stage: str) -> Scores:
        def report(_: str, done: int, total: int | None) -> None:
            context.report(stage, done, total)

        def measured(size: int) -> list[Likelihood]:
            return processes.share_out(
                texts, lambda part: text_likelihoods(base.model, base.tokenizer, part, window, size, report)
            )

        with steering:
            likelihoods, size = halving(measured, context.batch_size, stage)
        nats = [each.nll for each in likelihoods]
        counts: dict[str, list[float]] = {
            "words": [float(len(re.split(r"\s+", text))) for text in texts],
            "bytes": [float(len(text.encode())) for text in texts],
            "tokens": [float(each.tokens) for each in likelihoods],
        }
        metrics = {}
        for metric, unit in _PERPLEXITIES.items():
            rate = sum(nats) / sum(counts[unit]) if sum(counts[unit]) else math.nan
            error = rate_error(nats, counts[unit])
            in_bits = metric == "bits_per_byte"
            value, slope = (rate / math.log(2), 1 / math.log(2)) if in_bits else (safe_exp(rate), safe_exp(rate))
            documents, units = dict(enumerate(nats)), dict(enumerate(counts[unit]))
            metrics[metric] = Metric(value, error and slope * error, len(texts), documents, units)
        return task_scores(PERPLEXITY, metrics, [{"prompt": "", "answer": text} for text in texts], size)

    return measure


PERPLEXITY = NativeTask(
    "perplexity",
    partial(read_texts, field="text"),
    _perplexity,
    dict.fromkeys(_PERPLEXITIES, False),
    ".txt, or rows with `text`",
)


# Names of each field of `AnswerPair`, here and in published data sets.
_ANSWER_FIELDS = (
    ("prompt", "question"), ("positive", "answer_matching_behavior"), ("negative", "answer_not_matching_behavior")
)  # fmt: skip


class AnswerPair(NamedTuple):
    """A prompt and two answers; steering at s > 0 should raise the probability of the positive one."""

    prompt: str
    positive: str
    negative: str


def read_answer_pairs(name: Path | str) -> list[AnswerPair]:
    """Read rows with `prompt`, `positive` and `negative`, or with the names of published data sets."""
    pairs = []
    for row in read_rows(str(name)):
        found = [
            [row.fields[name] for name in names if isinstance(row.fields.get(name), str)] for names in _ANSWER_FIELDS
        ]
        pair = AnswerPair(*(texts[0] if texts else "" for texts in found))
        if not pair.positive or not pair.negative or pair.positive == pair.negative:
            hint = f"Such a row holds `prompt`, `positive` and `negative`; found: {', '.join(row.fields)}."
            raise DataError("no two different answers", where=row.where, hint=hint)
        pairs.append(pair)
    return pairs


def log_odds(session: Session, pairs: Sequence[AnswerPair], batch_size: int, chat: bool = False) -> list[float]:
    """Return the log odds of the positive answer of each pair, under the open model as it is steered now."""
    answers = [(prompt, answer) for prompt, *both in pairs for answer in both]
    nll = [each.nll for each in continuation_likelihoods(session.base, answers, batch_size, chat)]
    return [negative - positive for positive, negative in zip(nll[::2], nll[1::2], strict=True)]


def probability(odds: float) -> float:
    """Return the sigmoid of log odds."""
    return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))


# metric -> its value for the log odds of a document
_ANSWERS: dict[str, Callable[[float], float]] = {
    "probability": probability,
    "prefers_positive": lambda odds: float(odds > 0),
    "log_odds": lambda odds: odds,
}


def _answers(context: TaskContext, pairs: Sequence[AnswerPair]) -> Measure:
    def measure(steering: AbstractContextManager[Any], stage: str) -> Scores:
        def measured(size: int) -> list[float]:
            return context.processes.share_out(pairs, lambda part: log_odds(context.session, part, size, context.chat))

        with steering:
            odds, size = halving(measured, context.batch_size, stage)
        metrics = {name: mean_metric([[value(each)] for each in odds]) for name, value in _ANSWERS.items()}
        metrics["prefers_positive"].chance = 0.5
        samples = [
            {"prompt": pair.prompt, "answer": pair.positive if each > 0 else pair.negative}
            for pair, each in zip(pairs, odds, strict=True)
        ]
        return task_scores(ANSWERS, metrics, samples, size)

    return measure


def mean_metric(groups: Sequence[Sequence[float]]) -> Metric:
    """Return the mean over documents (prompts), each with the values of its samples."""
    means = [sum(group) / len(group) for group in groups]
    return Metric(sum(means) / len(means), cluster_error(groups), len(means), dict(enumerate(means)))


ANSWERS = NativeTask(
    "answers",
    read_answer_pairs,
    _answers,
    dict.fromkeys(_ANSWERS, True),
    "rows with `prompt`, `positive` and `negative`",
)


def read_labelled(name: Path | str) -> list[tuple[str, str]]:
    """Read (text, label) of rows with `text` and `attribute` or `label`."""
    labelled = []
    for row in read_rows(str(name)):
        text = row.fields.get("text")
        label = next((row.fields[key] for key in ("attribute", "label") if row.fields.get(key) is not None), None)
        if not isinstance(text, str) or not isinstance(label, (str, int)):
            hint = f"A labelled row holds `text` and `attribute` or `label`; found: {', '.join(row.fields)}."
            raise DataError("no text, or no label", where=row.where, hint=hint)
        labelled.append((text, str(label)))
    return labelled


# Half of the rows choose the layer; with 100 left, the standard error of an AUROC is about 0.05.
_ENOUGH = 200


def detection(
    session: Session, attribute: Attribute, rows: Sequence[tuple[str, str]], label: str, where: str, report: Report
) -> dict[str, Any]:
    """Return `{auroc, auroc_stderr, auroc_interval, layer, n, layers: [{layer, auroc}]}` of the open model.

    `auroc` is that of `layer` on the half of the texts that did not choose it, `layers` those of all texts. The
    standard error is that of Hanley and McNeil (1982).

    Args:
        rows: texts with labels.
        label: label of the texts with the attribute, in any case.
        where: source of the rows, for the error if fewer than two texts have the attribute, or do not have it.
    """
    has = [each.lower() == label.lower() for _, each in rows]
    sides = [[index for index, flag in enumerate(has) if flag == side] for side in (True, False)]
    if min(map(len, sides)) < 2:
        what = f"{len(sides[0])} texts are `{label}` and {len(sides[1])} are not; detection needs two of each"
        hint = f"The rows have {', '.join(sorted({each for _, each in rows}))}."
        raise DataError(what, where=where, hint=hint)
    if len(rows) < _ENOUGH:
        logger.warning("detection on %d rows is inexact; give %d or more", len(rows), _ENOUGH)
    scores = projections(session, attribute, [text for text, _ in rows], report)

    def areas(half: slice) -> list[float]:
        return [area(*(row[side[half]] for side in sides)) for row in scores]

    choosing, measured = areas(slice(0, None, 2)), slice(1, None, 2)
    best = choosing.index(max(choosing))
    value, counts = areas(measured)[best], [len(side[measured]) for side in sides]
    error = area_error(value, *counts)
    return {
        "auroc": value,
        "auroc_stderr": error,
        "auroc_interval": [max(0.0, value - Z * error), min(1.0, value + Z * error)],
        "layer": attribute.layers[best],
        "n": sum(counts),
        "layers": [
            {"layer": layer, "auroc": each} for layer, each in zip(attribute.layers, areas(slice(None)), strict=True)
        ],
    }


def projections(session: Session, attribute: Attribute, texts: Sequence[str], report: Report) -> Tensor:
    """Return the largest projection of a token's FFN input on p / |p|, (layers, texts), after special tokens."""
    base = session.base
    rows = text_rows(session, texts)
    directions = F.normalize(attribute.state, dim=-1)

    def projected(ffn: Any) -> Watch:
        direction = directions[attribute.layers.index(ffn.layer)].unsqueeze(1)
        return lambda callback: ffn.watch(lambda h: callback(h.detach().float() @ direction.to(h.device)))

    watches = [projected(ffn) for ffn in session.ffns]
    scores = torch.zeros(len(watches), len(rows))
    for indices, pooled in pooled_batches(base.model, watches, rows, "max", report, "reading texts"):
        scores[:, indices] = pooled.squeeze(-1)
    return scores


def area_error(value: float, positives: int, negatives: int) -> float:
    """Return the standard error of an AUROC (Hanley and McNeil 1982)."""
    one, two = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + (positives - 1) * (one - value**2) + (negatives - 1) * (two - value**2)
    return math.sqrt(max(spread, 0.0) / (positives * negatives))


def _detection(context: TaskContext, rows: Sequence[tuple[str, str]]) -> Measure:
    (attribute,) = context.attributes

    def measure(steering: AbstractContextManager[Any], stage: str) -> Scores:
        found = detection(context.session, attribute, rows, attribute.name, "--task-data detection", context.report)
        metrics = {"auroc": Metric(found["auroc"], found["auroc_stderr"], found["n"], chance=0.5)}
        return task_scores(DETECTION, metrics, (), context.batch_size)

    return measure


DETECTION = NativeTask("detection", read_labelled, _detection, {"auroc": True}, "rows with `text` and `label`")
