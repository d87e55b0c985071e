"""How a base model is loaded: the options that every command shares. Light: no torch here.

Options of every command that generates texts, declared once. Light: no torch here.

Ranges of numbers as options give them, such as `--layers 8-20,24` or `1-`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from braces_cli.core.config import GENERATION, MODEL, Settings, option
from braces_cli.core.errors import ConfigError
from braces_cli.core.text import whole_number

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Short names that other tools use.
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
QUANTISATIONS = ("int8", "bnb-8bit", "bnb-4bit")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Settings):
    """Where the weights of a base come from, where they go, and in which number format."""

    revision: str | None = option(None, help="Branch, tag or commit of a hub model.", panel=MODEL)
    device: str = option("auto", help="Device: auto, cpu, cuda (or cuda:1) or mps.", panel=MODEL, outcome=False)
    dtype: str = option(
        "auto",
        help="Data type of the base; auto uses the checkpoint's. fp32, bf16 and fp16 are also accepted.",
        panel=MODEL,
        choices=DTYPES,
    )
    device_map: str | None = option(
        None,
        help="Device map of accelerate; auto distributes the base over several devices.",
        panel=MODEL,
        outcome=False,
    )
    quantize: str | None = option(
        None,
        help="Quantise the base while loading: int8 with torchao, bnb-* with bitsandbytes.",
        panel=MODEL,
        choices=QUANTISATIONS,
    )
    trust_remote_code: bool = option(False, help="Allow model code from the hub.", panel=MODEL, outcome=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _SHORT_DTYPES.get(self.dtype, self.dtype))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ModelSettings(LoadOptions):
    """The base model of a command."""

    model: str | None = option(
        None,
        help="Base model: folder or hub id. Default: the adapter's base, else the embedded model.",
        metavar="MODEL",
        panel=MODEL,
    )

    @property
    def load_options(self) -> LoadOptions:
        """The part of these settings that loading a base needs."""
        return self.shared(LoadOptions)


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


def parse_ranges(text: str, count: int, option: str) -> list[int]:
    """Indices of `8-20,24` or `1-` (inclusive, from 0) among `count`, in order.

    Raises:
        ConfigError: not a list of ranges, or beyond what there is.
    """
    chosen: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        low = whole_number(first)
        high = low if not dash else whole_number(last) if last else count - 1
        if low is None or high is None:
            raise ConfigError(f"`{part}` is neither a number nor a range", where=option, hint="Such as 8-20,24 or 1-.")
        if low > high or high >= count:
            raise ConfigError(f"`{part}` is out of range", where=option, hint=f"The range is 0 to {count - 1}.")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def format_ranges(indices: Collection[int]) -> str:
    """Indices as `parse_ranges` reads them, such as `8-20,24`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def chosen_layers(model: nn.Module, text: str | None) -> list[int] | None:
    """Decoder layers of a `--layers` option; None, which is all, where it was not given."""
    from braces_cli.core.models.ffn import layer_stack

    return None if text is None else parse_ranges(text, len(layer_stack(model)[1]), "--layers")
