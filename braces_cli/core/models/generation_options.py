"""How texts are drawn from a model: the options that every command which generates text shares. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from braces_cli.core.utils.settings import GENERATION, Settings, option


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """How many texts, how long, and how their tokens are drawn."""

    num_samples: int = option(1, help="Texts for each prompt.", min=1, panel=GENERATION)
    max_new_tokens: int = option(50, help="Tokens of a text at most.", min=1, panel=GENERATION)
    temperature: float = option(1.0, help="Sampling temperature; 0 is greedy.", panel=GENERATION)
    top_p: float = option(
        0.9, help="Sample from the most likely tokens that together reach this probability.", panel=GENERATION
    )
