"""The contrasting texts of the steering study, also for `repeng_train.py`, which runs without braces installed."""

from __future__ import annotations

from braces_cli.core.attributes.words import built_in

TEMPLATES = (
    "It was {}",
    "The whole thing is {}",
    "I think that this was {}",
    "They said it had been {}",
    "What a {}",
    "She found it {}",
)
ENDS = ("positive", "negative")


def pairs() -> list[tuple[str, str]]:
    """A text of each end: for each template, each word of one list with one of the other."""
    words = built_in()
    return [
        (template.format(one), template.format(other))
        for template in TEMPLATES
        for one, other in zip(*(words[end] for end in ENDS), strict=True)
    ]
