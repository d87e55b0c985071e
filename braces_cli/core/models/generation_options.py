"""Options of every command that generates texts, declared once. Light: no torch here."""

from __future__ import annotations

from dataclasses import dataclass

from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import GENERATION, Settings, option


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """How many texts are generated for each prompt, how long they are, and how their tokens are drawn."""

    num_samples: int = option(1, help="Number of texts per prompt.", min=1, panel=GENERATION)
    max_new_tokens: int = option(50, help="Maximum number of new tokens per text.", min=1, panel=GENERATION)
    temperature: float = option(1.0, help="Sampling temperature; 0 is greedy.", panel=GENERATION)
    top_p: float = option(
        0.9, help="Nucleus sampling: total probability of the tokens to sample from.", panel=GENERATION
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.max_new_tokens, self.temperature, self.top_p)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse values with which no token can be drawn.

    Raises:
        ConfigError: names the option.
    """
    for flag, value, valid in (
        ("--temperature", temperature, 0 <= temperature < float("inf")),
        ("--top-p", top_p, 0 < top_p <= 1),
        ("--max-new-tokens", max_new_tokens, max_new_tokens > 0),
    ):
        if not valid:
            raise ConfigError(f"{value} is out of range", where=flag)
