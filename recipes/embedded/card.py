"""Model card of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ABOUT = """\
A small Llama for tests and demonstrations of braces without a network. It writes short reviews, stories and dialogues,
and answers questions about an invented world. Most of its facts are about things that do not exist: do not use it for
anything else.

`python recipes/embedded/build.py` generates texts, tokenizer and weights from the grammar and word lists in that
folder. They are part of braces, under its licence (Apache-2.0).
"""


def model_card(about: dict[str, Any], samples: Sequence[str]) -> str:
    """Return Markdown with the YAML header of the hub."""
    rows = {
        "Version": about["version"],
        "Seed": about["seed"],
        "Parameters": f"{about['parameters']:,}, bfloat16",
        "Context": f"{about['window']} tokens",
        "Trained on": f"{about['tokens']:,} tokens ({about['steps']:,} steps), each text seen once",
        "Held-out perplexity, per token": f"{about['held_out_perplexity']:.2f}",
        "Facts recalled in the wording of a statement": f"{about['fact_recall']:.0%}",
    }
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "language: en",
            "---",
            "",
            "# The embedded model of braces",
            "",
            _ABOUT,
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "Samples (top-p 0.9, seed 0):",
            "",
            *(f"- {' '.join(text.split())}" for text in samples),
            "",
        ]
    )
