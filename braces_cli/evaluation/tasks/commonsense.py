"""Scores of the `commonsense_gen_*` tasks: does the text name the right option?

    acc       the first option that the output names (`solution2`, `true`, ...) is the right one: the rule of
              LLM-Adapters, for which no option at all is wrong
    answered  the output names an option; on a base that was not taught the format, look here first

`tasks/commonsense_gen_*.yaml` name these functions; lm-eval calls them. The prompt is the one that `braces train` makes
of rows with `instruction` and `output`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from braces_cli.data.rows import instruction_prompt

DATA_SETS = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TASKS = tuple(f"commonsense_gen_{name}" for name in DATA_SETS)


def prompt(doc: dict[str, Any]) -> str:
    """The instruction as training shows it; the answer follows."""
    return instruction_prompt(doc["instruction"], doc.get("input") or "")


def target(doc: dict[str, Any]) -> str:
    """What the training rows answer."""
    return f"the correct answer is {doc['answer']}"


def named_option(output: str, answer: str) -> str | None:
    """The first option in `output`, of the kind that `answer` is one of; None where there is none."""
    kind = answer.rstrip("0123456789")
    pattern = r"true|false" if answer in ("true", "false") else rf"{re.escape(kind)}[1-9]"
    match = re.search(pattern, output)
    return None if match is None else match.group()


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`{acc, answered}` of one document, each 0 or 1."""
    option = named_option(results[0], doc["answer"])
    return {"acc": float(option == doc["answer"]), "answered": float(option is not None)}
