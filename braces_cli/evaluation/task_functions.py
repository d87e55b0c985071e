"""Functions that the definitions in `tasks/*.yaml` name: rows, prompts, targets and scores. lm-eval calls them.

popqa           acc: an answer as it is, lower-cased or capitalised, is contained in the output (the authors' rule,
                which also finds `Iran` in `Iranian`); acc_word: an answer is in the output as whole words, in any case
commonsense     acc: the first option named in the output (`solution2`, `true`, ...) is correct (the rule of
                LLM-Adapters; an output without an option is wrong); answered: the output names an option
embedded        rows about the world of the embedded model, in the schemas of PopQA and TruthfulQA
"""

import logging
import re
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import Any

from braces_cli.core.schema import decode
from braces_cli.data.rows import instruction_prompt

# Data sets of LLM-Adapters.
COMMONSENSE = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
COMMONSENSE_TASKS = tuple(f"commonsense_gen_{name}" for name in COMMONSENSE)

# lm-eval warns about extra arguments of every task that builds its rows; these functions have no arguments.
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs can be passed" not in record.getMessage())


def possible_answers(doc: dict[str, Any]) -> list[str]:
    """Return the answers of a PopQA row, stored as a list or as a JSON list in a string.

    Raises:
        ValueError: the field is neither, or has no answer.
    """
    raw = doc["possible_answers"]
    answers = decode(raw) if isinstance(raw, str) else raw
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError('possible_answers is not a JSON list of strings, such as ["Paris"]')
    if not any(answer.strip() for answer in answers):
        raise ValueError("possible_answers is empty")
    return answers


def popqa_target(doc: dict[str, Any]) -> str:
    """Return the first possible answer, for few-shot examples."""
    return possible_answers(doc)[0]


def contained(output: str, answers: Sequence[str]) -> bool:
    """Apply the rule of PopQA's authors; an empty alias counts as no answer."""
    return any(
        answer in output or answer.lower() in output or answer.capitalize() in output
        for answer in answers
        if answer.strip()
    )


def contained_as_words(output: str, answers: Sequence[str]) -> bool:
    """Return whether an answer is in `output` with no letter, digit, underscore or combining mark next to its ends.

    Case and the composition of accents are ignored. The ends can be punctuation (`Yahoo!`, `.hack`), which the
    regular expression `\\b` does not handle.
    """
    text = _folded(output)
    for answer in (_folded(each.strip()) for each in answers if each.strip()):
        start = text.find(answer)
        while start >= 0:
            end = start + len(answer)
            if not (start and _in_word(text[start - 1])) and not (end < len(text) and _in_word(text[end])):
                return True
            start = text.find(answer, start + 1)
    return False


def popqa_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return `{acc, acc_word}` of one document, each 0 or 1."""
    answers = possible_answers(doc)
    return {"acc": float(contained(results[0], answers)), "acc_word": float(contained_as_words(results[0], answers))}


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _in_word(char: str) -> bool:
    # Marks (category M), such as vowel signs, belong to the letter before them but are not alphanumeric.
    return char == "_" or char.isalnum() or unicodedata.category(char).startswith("M")


def commonsense_prompt(doc: dict[str, Any]) -> str:
    """Return the instruction in the format of training."""
    return instruction_prompt(doc["instruction"], doc.get("input") or "")


def commonsense_target(doc: dict[str, Any]) -> str:
    """Return the answer in the format of the training rows."""
    return f"the correct answer is {doc['answer']}"


def commonsense_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return `{acc, answered}` of one document, each 0 or 1."""
    options = _labels(doc, results[0])
    return {"acc": float(options[:1] == [doc["answer"]]), "answered": float(bool(options))}


def commonsense_labels(doc: dict[str, Any]) -> set[str]:
    """Return the labels that the instruction offers."""
    if doc["answer"] in ("true", "false"):
        return {"true", "false"}
    return {*_labels(doc, f"{doc['instruction']} {doc.get('input') or ''}"), doc["answer"]}


def _labels(doc: dict[str, Any], text: str) -> list[str]:
    """Return the labels of the answer's kind in a text, in its order."""
    kind = doc["answer"].rstrip("0123456789")
    return re.findall(r"true|false" if kind in ("true", "false") else rf"{re.escape(kind)}[1-9]", text)


def embedded_popqa_rows(**_: Any) -> Any:
    """Return `{test: rows}` in PopQA's schema."""
    return _embedded_rows("popqa.jsonl")


def embedded_truthful_rows(**_: Any) -> Any:
    """Return `{test: rows}` in the schema of TruthfulQA's multiple choice."""
    return _embedded_rows("truthful.jsonl")


def _embedded_rows(name: str) -> Any:
    from datasets import Dataset, DatasetDict

    text = (resources.files("braces_cli.assets") / "embedded_tasks" / name).read_text(encoding="utf-8")
    # From memory: `load_dataset` would cache the file, and a later version of the package would get the cached rows.
    return DatasetDict({"test": Dataset.from_list([decode(line) for line in text.splitlines()])})
