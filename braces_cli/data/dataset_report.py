"""What the rows of a run come to, before any model is loaded: counts, lengths, and examples as the model sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from braces_cli.core.models.tokenization import IGNORED, Encoded
from braces_cli.core.utils.progress import Report, silent
from braces_cli.data.examples import Counts, Reading, check_some, iterate

BARS = 10
SHOWN = 2
# Tokens of a shown example: what follows is left out.
SHOWN_TOKENS = 512


def check_rows(names: Sequence[str], how: Reading, report: Report = silent) -> dict[str, Any]:
    """Read and tokenise all rows, one at a time.

    Returns:
        `rows, examples, truncated, dropped, tokens, scored_tokens, max_length, lengths: {least, median, mean, most},
        histogram: [{from, to, examples}], formats: {name: rows}, attributes: {name: rows}, shown: [{where, parts:
        [{text, scored}]}], strengths: {attribute: {least, mean, most}}, dropped_at: [where]`.

    Raises:
        DataError: a row cannot be read, or none has a scored token.
    """
    counts, formats, attributes = Counts(), Counter[str](), Counter[str]()
    strengths: dict[str, Counter[float]] = {}
    lengths = Counter[int]()
    scored = 0
    shown: list[dict[str, Any]] = []
    for example in iterate(names, how):
        counts.add(example)
        formats[example.format] += 1
        if example.condition is not None:
            name = example.condition.attribute or "neutral"
            attributes[name] += 1
            strengths.setdefault(name, Counter())[example.condition.strength] += 1
        if counts.rows % 256 == 0:
            report("reading", counts.rows, None)
        if example.tokens is None:
            continue
        lengths[len(example.tokens.ids)] += 1
        scored += example.tokens.scored
        if len(shown) < SHOWN:
            shown.append({"where": example.where, "parts": decode_parts(how.tokenizer, example.tokens)})
    report("reading", counts.rows, counts.rows)
    examples, tokens = lengths.total(), sum(length * count for length, count in lengths.items())
    check_some(names, examples, counts.rows)
    return {
        "rows": counts.rows,
        "examples": examples,
        "truncated": counts.truncated,
        "dropped": counts.dropped,
        "tokens": tokens,
        "scored_tokens": scored,
        "max_length": how.max_length,
        "lengths": {"least": min(lengths), "median": _median(lengths), "mean": tokens / examples, "most": max(lengths)},
        "histogram": _histogram(lengths),
        "formats": dict(formats),
        "attributes": dict(attributes),
        "shown": shown,
        "strengths": {
            name: {
                "least": min(values),
                "mean": sum(s * n for s, n in values.items()) / attributes[name],
                "most": max(values),
            }
            for name, values in strengths.items()
        },
        "dropped_at": counts.dropped_at,
    }


def decode_parts(tokenizer: Any, tokens: Encoded) -> list[dict[str, Any]]:
    """The text of an example in stretches that are scored or not, special tokens written out."""
    ids = tokens.ids[:SHOWN_TOKENS]
    # The first token of a sequence is never scored, whatever its label.
    flags = [False, *(label != IGNORED for label in tokens.labels[1 : len(ids)])]
    starts = [index for index in range(len(ids)) if index == 0 or flags[index] != flags[index - 1]]
    parts = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        # As it reads behind what stands before it: decoded alone, some tokenizers drop a space in front.
        before, whole = _decode(tokenizer, ids[:start]), _decode(tokenizer, ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids[start:end])
        parts.append({"text": text, "scored": flags[start]})
    if len(tokens.ids) > len(ids):
        parts.append({"text": f" ... ({len(tokens.ids) - len(ids)} more tokens)", "scored": False})
    return parts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
    return text


def _median(lengths: Counter[int]) -> int:
    half, seen = (lengths.total() + 1) // 2, 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= half:
            return length
    raise AssertionError("no lengths")


def _histogram(lengths: Counter[int]) -> list[dict[str, int]]:
    """At most ten bars of equal width, from the shortest example to the longest."""
    least, most = min(lengths), max(lengths)
    width = -(-(most - least + 1) // BARS)
    return [
        {
            "from": start,
            "to": start + width - 1,
            "examples": sum(lengths[length] for length in range(start, start + width)),
        }
        for start in range(least, most + 1, width)
    ]
