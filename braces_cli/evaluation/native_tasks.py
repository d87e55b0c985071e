"""Tasks that lm-eval cannot run, each registered here: what it reads, and how it measures the model that is open.

A new one is a module with a `TASK`, and its line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braces_cli.evaluation.native_task import Measured, OwnTask, Setting
from braces_cli.evaluation.oom_backoff import halving


def _read_texts(path: Path) -> Sequence[Any]:
    from braces_cli.evaluation.task_rows import read_texts

    return read_texts(path)


def _measure_perplexity(setting: Setting, texts: Sequence[str]) -> Measured:
    from braces_cli.evaluation import perplexity

    base = setting.session.base
    found, size = halving(
        lambda size: perplexity.measure(
            base.model,
            base.tokenizer,
            texts,
            size,
            lambda _, done, total: setting.report(setting.stage, done, total),
            setting.processes,
        ),
        setting.batch_size,
        setting.stage,
    )
    samples = {index: {"prompt": "", "answer": text} for index, text in enumerate(texts)}
    return Measured(found.results, found.nats, found.units, samples, size)


PERPLEXITY = OwnTask(
    "perplexity",
    _read_texts,
    _measure_perplexity,
    dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"), False),
    ".txt, or rows with `text`",
)


def _text_quality(name: str, scored: dict[str, bool]) -> OwnTask:
    def read(path: Path) -> Sequence[Any]:
        from braces_cli.evaluation import text_quality

        return text_quality.read(path)

    def measure(setting: Setting, prompts: Sequence[Any]) -> Measured:
        from braces_cli.evaluation import text_quality

        return text_quality.measurer(name)(setting, prompts)

    diversity = dict.fromkeys(("distinct_1", "distinct_2", "distinct_3"), True)
    metrics = {**scored, "perplexity": False, **diversity, "repetition": False}
    return OwnTask(name, read, measure, metrics, "prompts, one a line, or rows with `prompt`")


SENTIMENT = _text_quality("sentiment", {"positive": True, "negative": False})
TOXICITY = _text_quality("toxicity", {"toxic": False})

TASKS: dict[str, OwnTask] = {task.name: task for task in (PERPLEXITY, SENTIMENT, TOXICITY)}
