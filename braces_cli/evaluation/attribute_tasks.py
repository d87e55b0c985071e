"""The tasks `answers` and `detection`: what an attribute does to the choice between two answers, and what it detects.

answers     probability (of the positive answer against the negative one), prefers_positive, log_odds
detection   auroc, see `core.attributes.detection`; of the model as it stands, not steered, so that it is the same
            at every strength
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from braces_cli.core.attributes.detection import detection
from braces_cli.core.attributes.intervention import steered
from braces_cli.core.utils.errors import ConfigError, DataError
from braces_cli.evaluation.native_tasks import NativeTask, TaskContext, TaskResult
from braces_cli.evaluation.oom_backoff import halving
from braces_cli.scoring.confidence_intervals import cluster_error
from braces_cli.steering.answer_preference import AnswerPair, log_odds, probability, read_answer_pairs
from braces_cli.steering.scorer_loading import read_labelled

# metric -> its value from the log odds of a document.
_METRICS: dict[str, Callable[[float], float]] = {
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
    for metric, value in _METRICS.items():
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
    dict.fromkeys(_METRICS, True),
    "rows with `prompt`, `positive` and `negative`",
)
DETECTION = NativeTask("detection", _read_labelled, _detection, {"auroc": True}, "rows with `text` and `label`")
