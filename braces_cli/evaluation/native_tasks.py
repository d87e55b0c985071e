"""Halve a batch size that does not fit into memory, warn, and continue, so that no evaluation is lost to it.

A task that braces measures itself, without lm-eval: what it is given and what it returns.

A new one is a module with a `NativeTask`, registered in `task_catalog.NATIVE_TASKS`.

The scorer of a sweep or a task: one that is there, or one fitted from the user's own labelled rows.

Which of two answers a model prefers, as it is steered now: rows of contrastive evaluation sets (CAA).

    log odds      ln P(positive answer | prompt) - ln P(negative answer | prompt)
    probability   of the positive answer, where there are only these two: sigmoid of the log odds

Whole answers are scored, so of answers of different lengths the shift says something and the level little.

Concept detection: how well an attribute's direction tells texts with the attribute from others (as in AxBench).

A text's score at a layer is the largest projection of a token's FFN input on the direction p. AUROC is the probability
that a random text with the attribute scores higher than a random one without. The layer is chosen on half of the texts
and measured on the other half: the best of many layers looks better than it is on the texts that chose it.

The `perplexity` task: perplexity of a model on texts of the user's own.

    word_perplexity   exp(nll / words)       words as lm-eval counts them: what white space separates
    byte_perplexity   exp(nll / bytes)       bytes of the UTF-8 text
    bits_per_byte     nll / bytes / ln 2
    token_perplexity  exp(nll / tokens)      depends on the tokenizer; not for comparing models

Each document follows exactly one start token; lm-eval's own rolling log-likelihood can put two. Documents are plain
texts, so no chat template is applied.

The tasks `answers` and `detection`: what an attribute does to the choice between two answers, and what it detects.

answers     probability (of the positive answer against the negative one), prefers_positive, log_odds
detection   auroc, see `evaluation.native_tasks`; of the model as it stands, not steered, so that it is the same
            at every strength
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.directions import area
from braces_cli.core.attributes.files import TRAINED_FILE
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.pooling import Row, Watch, pooled_batches
from braces_cli.core.attributes.vector import Attribute, load_attributes
from braces_cli.core.attributes.words import OPPOSITES, built_in
from braces_cli.core.distributed import Processes
from braces_cli.core.errors import BracesError, ConfigError, DataError
from braces_cli.core.files import path_exists
from braces_cli.core.models.chat import encode_answer
from braces_cli.core.models.tokenize import Encoded, context_length, encode
from braces_cli.core.progress import Report, silent
from braces_cli.core.text import safe_exp
from braces_cli.data.rows import read_rows
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.statistics import cluster_error, rate_error
from braces_cli.evaluation.task_data import read_texts
from braces_cli.scoring.classifier import Classifier, fit_classifier
from braces_cli.scoring.likelihood import likelihoods, text_likelihoods
from braces_cli.scoring.registry import scorer
from braces_cli.scoring.scorers import Scorer

logger = logging.getLogger("braces")

T = TypeVar("T")


def halving(work: Callable[[int], T], size: int, stage: str) -> tuple[T, int]:
    """Call `work` with a batch size, and with half of it each time that memory does not suffice.

    Returns:
        What `work` returned, and the batch size that fitted.

    Raises:
        BracesError: not even one sequence at a time fits.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if size == 1:
                hint = "Load the base in fewer bits (--dtype bfloat16, --quantize bnb-4bit) or on several devices."
                raise BracesError("out of memory with one sequence at a time", where=stage, hint=hint) from error
        # Beyond the except clause, whose traceback holds on to the very tensors that did not fit.
        clear_device_cache(garbage_collection=True)
        logger.warning("%s: out of memory with %d sequences a pass, going on with %d", stage, size, size // 2)
        size //= 2


@dataclass(frozen=True)
class TaskContext:
    """What a task may need beside its documents.

    Attributes:
        session: the open base, with the adapter on it; `session.adapter` is None for an adapter of peft.
        batch_size: sequences in a forward pass to begin with; see `oom_backoff.halving`.
        chat_template: put prompts into the tokenizer's chat template.
        seed: seed of every random choice.
        processes: use `share_out` so that each process does its part.
        stage: name of the progress bar.
        settings: for tasks that generate texts.
        terms: attributes with their strengths, by which the task steers the model wherever it is measured.
        attributes: all attributes of the run, the same for every system, steered or not.
    """

    session: Session
    batch_size: int
    chat_template: bool = False
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    stage: str = ""
    report: Report = silent
    settings: EvalSettings = field(default_factory=EvalSettings)
    terms: Sequence[tuple[Attribute, float]] = ()
    attributes: Sequence[Attribute] = ()


@dataclass
class TaskResult:
    """What one system scored on a native task.

    Attributes:
        results: metric -> `{value, stderr, n}`, n the number of documents.
        documents: metric -> document -> value.
        units: metric -> document -> what the metric divides by, where it is a ratio of sums.
        samples: document -> `prompt` and `answer` for the per-sample log.
        batch_size: the batch size that fitted into memory.
    """

    results: dict[str, dict[str, Any]]
    documents: dict[str, dict[int, float]]
    units: dict[str, dict[int, float]] = field(default_factory=dict)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 1


@dataclass(frozen=True)
class NativeTask:
    """A task that braces measures itself.

    Attributes:
        read: documents of a data file; raises DataError.
        measure: results on documents, on every process alike.
        metrics: metric -> whether more of it is better, in the order they are shown.
        data: what its data file holds, for the hint where there is none.
    """

    name: str
    read: Callable[[Path], Sequence[Any]]
    measure: Callable[[TaskContext, Sequence[Any]], TaskResult]
    metrics: dict[str, bool]
    data: str


FIT = "fit:"
# The column of labels, the first of these that a row has.
LABEL_FIELDS = ("attribute", "label")


def open_scorer(name: str, *, exclude: Collection[str] = ()) -> Scorer:
    """The scorer called `name`; `fit:ROWS` fits a classifier from labelled rows (a file or a hub set).

    Args:
        exclude: words that it must not look at.

    Raises:
        ConfigError: unknown, not installed, or cannot leave words out.
        DataError: rows that cannot be read, or without text or label.
        ModelError: a classifier that cannot be loaded.
    """
    if not name.startswith(FIT):
        return scorer(name, exclude=exclude)
    rows = name.removeprefix(FIT)
    texts, labels = read_labelled(rows)
    try:
        fitted = fit_classifier(texts, labels, exclude)
    except DataError as error:
        raise DataError(error.message, where=rows, hint=error.hint) from error
    fitted.name = name
    _log_accuracy(fitted)
    return fitted


def read_labelled(name: str) -> tuple[list[str], list[str]]:
    """Texts and labels of rows with `text` and `attribute` or `label`.

    Raises:
        DataError: as `read_rows`, or a row without one of them.
    """
    texts, labels = [], []
    for row in read_rows(name):
        text = row.fields.get("text")
        label = next((row.fields[field] for field in LABEL_FIELDS if row.fields.get(field) is not None), None)
        if not isinstance(text, str) or not isinstance(label, (str, int)):
            hint = f"A labelled row holds `text` and `{'` or `'.join(LABEL_FIELDS)}`; found: {', '.join(row.fields)}."
            raise DataError("no text, or no label", where=row.where, hint=hint)
        texts.append(text)
        labels.append(str(label))
    return texts, labels


def list_words(session: Session, attributes: Sequence[Attribute], *, trained: bool = True) -> set[str]:
    """Words of the attributes, of their opposites, and where `trained`, of all that the adapter was trained with."""
    words = {word for attribute in attributes for word in attribute.words}
    lists = built_in()
    for attribute in attributes:
        words |= set(lists.get(OPPOSITES.get(attribute.name, ""), ()))
    if trained and session.folder is not None and path_exists(session.folder / TRAINED_FILE):
        trained_with = load_attributes(session.folder / TRAINED_FILE, session)
        words |= {word for attribute in trained_with.values() for word in attribute.words}
    return words


def _log_accuracy(fitted: Classifier) -> None:
    accuracy = fitted.measured["accuracy"]
    if accuracy is not None:
        majority = fitted.measured["majority"]
        logger.info(
            "%s: %.1f %% right on rows held out, %.1f %% by guessing", fitted.name, 100 * accuracy, 100 * majority
        )


# Names of the fields of a row, ours and those of the published sets.
_FIELDS = {
    "prompt": ("prompt", "question"),
    "positive": ("positive", "answer_matching_behavior"),
    "negative": ("negative", "answer_not_matching_behavior"),
}


@dataclass(frozen=True)
class AnswerPair:
    """A prompt and two answers to it, of which steering at s > 0 should make the positive one likelier."""

    prompt: str
    positive: str
    negative: str


def read_answer_pairs(name: str) -> list[AnswerPair]:
    """Rows with `prompt`, `positive` and `negative`, or named as in the published sets.

    Raises:
        DataError: as `read_rows`, or a row without two different answers.
    """
    pairs = []
    for row in read_rows(name):
        fields = {
            ours: next((row.fields[each] for each in names if isinstance(row.fields.get(each), str)), None)
            for ours, names in _FIELDS.items()
        }
        if not fields["positive"] or not fields["negative"] or fields["positive"] == fields["negative"]:
            hint = f"Such a row holds `prompt`, `positive` and `negative`; found: {', '.join(row.fields)}."
            raise DataError("no two different answers", where=row.where, hint=hint)
        pairs.append(AnswerPair(fields["prompt"] or "", fields["positive"], fields["negative"]))
    return pairs


def log_odds(session: Session, pairs: Sequence[AnswerPair], batch_size: int, chat: bool = False) -> list[float]:
    """Of the positive answer against the negative one, for each pair, as the open model is steered now.

    Args:
        chat: the prompt is a user's turn, and the answer the model's.
    """
    base = session.base
    window = context_length(base.model.config, base.tokenizer)
    examples = []
    for pair in pairs:
        for answer in (pair.positive, pair.negative):
            turn = (encode_answer if chat else encode)(base.tokenizer, pair.prompt, answer)
            examples.append(Encoded(turn.ids[-window:], turn.labels[-window:], False, False))
    nll = [each.nll for each in likelihoods(base.model, examples, base.tokenizer.pad_token_id, batch_size)]
    return [negative - positive for positive, negative in zip(nll[::2], nll[1::2], strict=True)]


def probability(odds: float) -> float:
    """Of the positive answer, from its log odds."""
    return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))


_Z = 1.959964  # 95 %, two-sided


def detection(
    session: Session, attribute: Attribute, texts: Sequence[str], has: Sequence[bool], report: Report = silent
) -> dict[str, Any]:
    """`{auroc, auroc_stderr, auroc_interval, layer, n, layers: [{layer, auroc}]}` of the open model as it stands.

    `auroc` is that of `layer` on the half of the texts that did not choose it, `layers` have those of all texts. The
    standard error is Hanley and McNeil's.

    Args:
        has: whether each text has the attribute.

    Raises:
        DataError: fewer than two texts with it, or without it.
    """
    sides = [[index for index, flag in enumerate(has) if flag == side] for side in (True, False)]
    if min(map(len, sides)) < 2:
        what = f"{len(sides[0])} texts are `{attribute.name}` and {len(sides[1])} are not"
        raise DataError(what, hint="Detection needs at least two of each.")
    scores = projections(session, attribute, texts, report)

    def auroc(layer: int, half: slice) -> float:
        return area(*(scores[layer, side[half]] for side in sides))

    rows = range(len(attribute.layers))
    best = max(rows, key=lambda row: auroc(row, slice(0, None, 2)))
    other = slice(1, None, 2)
    value, counts = auroc(best, other), [len(side[other]) for side in sides]
    error = area_error(value, *counts)
    return {
        "auroc": value,
        "auroc_stderr": error,
        "auroc_interval": [max(0.0, value - _Z * error), min(1.0, value + _Z * error)],
        "layer": attribute.layers[best],
        "n": sum(counts),
        "layers": [{"layer": attribute.layers[row], "auroc": auroc(row, slice(None))} for row in rows],
    }


def projections(session: Session, attribute: Attribute, texts: Sequence[str], report: Report = silent) -> Tensor:
    """Largest projection of a token's FFN input on p / |p|, (layers, texts); special tokens in front do not count."""
    base = session.base
    max_length, special = context_length(base.model.config, base.tokenizer), set(base.tokenizer.all_special_ids)
    rows: list[Row] = []
    for text in texts:
        ids = encode(base.tokenizer, text, max_length=max_length).ids
        rows.append((ids, next((place for place, token in enumerate(ids) if token not in special), 0)))
    directions = F.normalize(attribute.state, dim=-1)
    watches: list[Watch] = [
        partial(_watch, ffn.watch, directions[attribute.layers.index(ffn.layer)]) for ffn in session.ffns
    ]
    scores = torch.zeros(len(watches), len(rows))
    for indices, pooled in pooled_batches(base.model, watches, rows, "max", report, "reading texts"):
        scores[:, indices] = pooled.squeeze(-1)
    return scores


def _watch(watch: Watch, direction: Tensor, callback: Callable[[Tensor], None]) -> Any:
    """Watch the projections (..., 1) of what is watched."""
    return watch(lambda h: callback(h.detach().float() @ direction.to(h.device).unsqueeze(1)))


def area_error(value: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982)."""
    one, two = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + (positives - 1) * (one - value**2) + (negatives - 1) * (two - value**2)
    return math.sqrt(max(spread, 0.0) / (positives * negatives))


# metric -> (units it divides by, value of nats per unit, derivative of that value)
_METRICS: dict[str, tuple[str, Callable[[float], float], Callable[[float], float]]] = {
    "word_perplexity": ("words", safe_exp, safe_exp),
    "byte_perplexity": ("bytes", safe_exp, safe_exp),
    "bits_per_byte": ("bytes", lambda rate: rate / math.log(2), lambda rate: 1 / math.log(2)),
    "token_perplexity": ("tokens", safe_exp, safe_exp),
}


def measure(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int,
    report: Report = silent,
    processes: Processes | None = None,
) -> TaskResult:
    """Perplexities over all `texts`, and negative log-likelihoods in nats and units document by document."""
    window = context_length(model.config, tokenizer)
    likelihoods = (processes or Processes()).share_out(
        texts, lambda part: text_likelihoods(model, tokenizer, part, window, batch_size, report)
    )
    nats = [each.nll for each in likelihoods]
    counts: dict[str, list[float]] = {
        "words": [float(len(re.split(r"\s+", text))) for text in texts],
        "bytes": [float(len(text.encode())) for text in texts],
        "tokens": [float(each.tokens) for each in likelihoods],
    }
    result = TaskResult({}, {}, batch_size=batch_size)
    for metric, (unit, value, slope) in _METRICS.items():
        rate = sum(nats) / sum(counts[unit]) if sum(counts[unit]) else math.nan
        error = rate_error(nats, counts[unit])
        stderr = None if error is None else slope(rate) * error
        result.results[metric] = {"value": value(rate), "stderr": stderr, "n": len(texts)}
        result.documents[metric] = dict(enumerate(nats))
        result.units[metric] = dict(enumerate(counts[unit]))
    result.samples = {index: {"prompt": "", "answer": text} for index, text in enumerate(texts)}
    return result


def _measure_task(context: TaskContext, texts: Sequence[str]) -> TaskResult:
    base = context.session.base

    def report(_: str, done: int, total: int | None) -> None:
        context.report(context.stage, done, total)

    with steered(context.session, context.terms):
        result, _ = halving(
            lambda size: measure(base.model, base.tokenizer, texts, size, report, context.processes),
            context.batch_size,
            context.stage,
        )
    return result


PERPLEXITY = NativeTask(
    "perplexity", read_texts, _measure_task, dict.fromkeys(_METRICS, False), ".txt, or rows with `text`"
)


# metric -> its value from the log odds of a document.
_ATTRIBUTE_METRICS: dict[str, Callable[[float], float]] = {
    "probability": probability,
    "prefers_positive": lambda odds: float(odds > 0),
    "log_odds": lambda odds: odds,
}


def _read_labelled(path: Path) -> Sequence[tuple[str, str]]:
    return list(zip(*read_labelled(str(path)), strict=True))


def check_detection(attributes: Sequence[str]) -> None:
    """Refuse `detection` without the one attribute that it measures.

    Raises:
        ConfigError: none, or several.
    """
    if len(attributes) != 1:
        hint = "Such as --attribute positive, with rows that are labelled `positive` and otherwise."
        raise ConfigError(f"detection needs one attribute, not {len(attributes)}", where="--attribute", hint=hint)


def _answers(context: TaskContext, pairs: Sequence[AnswerPair]) -> TaskResult:
    def measure(size: int) -> list[float]:
        return context.processes.share_out(
            pairs, lambda part: log_odds(context.session, part, size, context.chat_template)
        )

    with steered(context.session, context.terms):
        odds, size = halving(measure, context.batch_size, context.stage)
    result = TaskResult({}, {}, batch_size=size)
    for metric, value in _ATTRIBUTE_METRICS.items():
        values = [value(each) for each in odds]
        stderr = cluster_error([[each] for each in values])
        result.results[metric] = {"value": sum(values) / len(values), "stderr": stderr, "n": len(values)}
        result.documents[metric] = dict(enumerate(values))
    result.samples = {
        index: {"prompt": pair.prompt, "answer": pair.positive if odds[index] > 0 else pair.negative}
        for index, pair in enumerate(pairs)
    }
    return result


def _detection(context: TaskContext, rows: Sequence[tuple[str, str]]) -> TaskResult:
    (attribute,) = context.attributes
    has = [label.lower() == attribute.name.lower() for _, label in rows]
    try:
        found = detection(context.session, attribute, [text for text, _ in rows], has)
    except DataError as error:
        hint = f"The rows have {', '.join(sorted({label for _, label in rows}))}."
        raise DataError(error.message, where="detection", hint=hint) from error
    entry = {"value": found["auroc"], "stderr": found["auroc_stderr"], "n": found["n"]}
    return TaskResult({"auroc": entry}, {}, batch_size=context.batch_size)


ANSWERS = NativeTask(
    "answers",
    lambda path: read_answer_pairs(str(path)),
    _answers,
    dict.fromkeys(_ATTRIBUTE_METRICS, True),
    "rows with `prompt`, `positive` and `negative`",
)
DETECTION = NativeTask("detection", _read_labelled, _detection, {"auroc": True}, "rows with `text` and `label`")
