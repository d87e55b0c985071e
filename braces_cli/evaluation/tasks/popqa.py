"""Scores of the `popqa` task: does the output name one of the possible answers?

    acc       an answer as it is, lower-cased or capitalised is contained in the output (the authors' rule, which
              also takes `Iran` out of `Iranian`)
    acc_word  an answer stands in the output as whole words, whatever the case

`tasks/popqa.yaml` names these functions; lm-eval calls them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from braces_cli.core.schema import decode


def possible_answers(doc: dict[str, Any]) -> list[str]:
    """The answers of a row, which the data set keeps as a JSON list in a string; a plain list is taken as well.

    Raises:
        ValueError: neither.
    """
    raw = doc["possible_answers"]
    answers = decode(raw) if isinstance(raw, str) else raw
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("possible_answers is not a JSON list of strings")
    return answers


def target(doc: dict[str, Any]) -> str:
    """The first possible answer: what a few-shot example shows."""
    return possible_answers(doc)[0]


def contained(output: str, answers: Sequence[str]) -> bool:
    """The authors' rule."""
    # An empty alias would be contained in everything.
    return any(
        answer in output or answer.lower() in output or answer.capitalize() in output
        for answer in answers
        if answer.strip()
    )


def contained_as_words(output: str, answers: Sequence[str]) -> bool:
    """Whether an answer stands in `output` with no letter, digit, underscore or combining mark touching its ends.

    Case and the way accents are composed do not matter. The ends may be punctuation (`Yahoo!`, `.hack`), which the
    regular expression `\\b` would get wrong.
    """
    text = _folded(output)
    return any(_stands_alone(text, _folded(answer.strip())) for answer in answers if answer.strip())


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`{acc, acc_word}` of one document, each 0 or 1."""
    answers = possible_answers(doc)
    return {
        "acc": float(contained(results[0], answers)),
        "acc_word": float(contained_as_words(results[0], answers)),
    }


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _stands_alone(text: str, answer: str) -> bool:
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        if not (start and _in_word(text[start - 1])) and not (end < len(text) and _in_word(text[end])):
            return True
        start = text.find(answer, start + 1)
    return False


def _in_word(char: str) -> bool:
    # Vowel signs and other marks (category M) belong to the letter before them, though they are not alphanumeric.
    return char == "_" or char.isalnum() or unicodedata.category(char).startswith("M")
