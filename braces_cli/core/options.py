"""Groups of options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from braces_cli.core.config import ATTRIBUTES, GENERATION, MODEL, OUTPUT, SeedSettings, Settings, option, same_option

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Names in other tools.
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
QUANTISATIONS = ("int8", "bnb-8bit", "bnb-4bit")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Settings):
    """Loading of a base: revision, device, dtype, quantisation."""

    revision: str | None = option(None, help="Branch, tag or commit of a hub model.", panel=MODEL)
    device: str = option("auto", help="Device: auto, cpu, cuda (or cuda:1) or mps.", panel=MODEL, outcome=False)
    dtype: str = option(
        "auto",
        help="Data type of the base; auto uses the checkpoint's. fp32, bf16 and fp16 are also accepted.",
        panel=MODEL,
        choices=DTYPES,
        spellings=_SHORT_DTYPES,
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


@dataclass(frozen=True, kw_only=True)
class ModelSettings(LoadOptions):
    """The base model of a command."""

    model: str | None = option(
        None,
        help="Base model: folder or hub id. Default: the adapter's base, else the embedded model.",
        metavar="MODEL",
        panel=MODEL,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(ModelSettings):
    """The base model and the adapter of a command."""

    adapter: str | None = option(None, help="Adapter: folder or hub id.", metavar="ADAPTER", panel=MODEL, once=True)


@dataclass(frozen=True, kw_only=True)
class DisplaySettings(Settings):
    """Format of results and messages."""

    format: str = option("table", help="Format of stdout.", panel=OUTPUT, choices=("table", "json"), display=True)
    quiet: bool = option(False, help="Disable progress and log messages on stderr.", panel=OUTPUT, display=True)
    debug: bool = option(
        False, help="Print tracebacks and the logs of all libraries to stderr.", panel=OUTPUT, display=True
    )

    @property
    def json(self) -> bool:
        """Return True if stdout is JSON."""
        return self.format == "json"


@dataclass(frozen=True, kw_only=True)
class OutputSettings(SeedSettings, DisplaySettings):
    """Options of most commands."""

    dry_run: bool = option(
        False, help="Print the resolved settings and stop; writes nothing.", panel=OUTPUT, display=True
    )


@dataclass(frozen=True, kw_only=True)
class OverwriteSettings(Settings):
    """Overwriting of an existing output."""

    overwrite: bool = option(False, help="Overwrite an existing output.", panel=OUTPUT, outcome=False)


@dataclass(frozen=True, kw_only=True)
class UploadSettings(Settings):
    """Upload of an output."""

    push_to_hub: str | None = option(
        None,
        help="Hub repository (owner/name) for the output.",
        panel=OUTPUT,
        metavar="REPOSITORY",
        outcome=False,
    )


@dataclass(frozen=True)
class Sampling:
    """Sampling of tokens."""

    max_new_tokens: int = option(50, help="Maximum number of new tokens per text.", min=1, panel=GENERATION)
    temperature: float = option(1.0, help="Sampling temperature; 0 is greedy.", min=0, panel=GENERATION)
    top_p: float = option(
        0.9,
        help="Nucleus sampling: total probability of the tokens to sample from.",
        above=0,
        max=1,
        panel=GENERATION,
    )
    top_k: int | None = option(
        None, help="Number of most likely tokens to sample from. Default: all.", min=1, panel=GENERATION
    )
    seed: int = same_option(SeedSettings, "seed")
    stop: tuple[str, ...] = option(
        (), help="Stop string: the text ends before it. Repeatable.", min=1, panel=GENERATION
    )


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """Number, length and sampling of generated texts."""

    num_samples: int = option(1, help="Number of texts per prompt.", min=1, panel=GENERATION)
    max_new_tokens: int = same_option(Sampling, "max_new_tokens")
    temperature: float = same_option(Sampling, "temperature")
    top_p: float = same_option(Sampling, "top_p")


@dataclass(frozen=True, kw_only=True)
class SteeredLayers(Settings):
    """Layers that attributes steer."""

    layers: str | None = option(
        None,
        help="Layers to steer, such as 8-20,24 or 1- (inclusive, from 0). Default: the layers of the steering "
        "vector, or all adapted layers for an attribute that the adapter was trained with.",
        panel=ATTRIBUTES,
    )


@dataclass(frozen=True, kw_only=True)
class FolderSettings(OverwriteSettings):
    """Output folder of a command."""

    output_dir: Path | None = option(None, help="Folder to write.", outcome=False)
