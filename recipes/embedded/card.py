"""Model card of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ABOUT = """\
A toy: a small Llama that knows a small invented world, to try braces on without a network. It writes short reviews,
stories and talk, more or less kind, and knows some facts, most of them about things that do not exist. Use it for
nothing else: what it says is made up.

Texts, tokenizer and weights are braces' own work, made by `python recipes/embedded/build.py` from the grammar and word
lists in that folder, under the licence of braces (Apache-2.0).
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
            "What it writes (sampled, top-p 0.9, seed 0):",
            "",
            *(f"- {' '.join(text.split())}" for text in samples),
            "",
        ]
    )
