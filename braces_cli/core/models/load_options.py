"""How a base model is loaded: the options that every command shares. Light: no torch here."""

from __future__ import annotations

from dataclasses import dataclass

from braces_cli.core.utils.settings import MODEL, Settings, option

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
