"""Groups of options that several commands share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from braces_cli.core.config import ATTRIBUTES, GENERATION, MODEL, OUTPUT, SCORING, Settings, option, same_option
from braces_cli.core.errors import ConfigError
from braces_cli.core.schema import Kind, Malformed, decode, read

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Names in other tools.
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
QUANTISATIONS = ("int8", "bnb-8bit", "bnb-4bit")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Settings):
    """Loading of a base: revision, device, dtype, quantisation.

    Attributes:
        revision: Branch, tag or commit of a hub model.
        device: Device: auto, cpu, cuda (or cuda:1) or mps.
        dtype: Data type of the base; auto uses the checkpoint's, and bfloat16 for a quantised GGUF file. fp32, bf16 and
            fp16 are also accepted.
        device_map: Device map of accelerate; auto distributes the base over several devices.
        attn_implementation: Implementation of attention, if that of the base's config is not installed.
        quantize: Quantise the base while loading: int8 with torchao, bnb-* with bitsandbytes.
        trust_remote_code: Allow model code from the hub.
        allow_other_base: Use adapters and attributes of another base of the same width.
    """

    revision: str | None = option(None, panel=MODEL)
    device: str = option("auto", panel=MODEL, outcome=False)
    dtype: str = option("auto", panel=MODEL, choices=DTYPES, spellings=_SHORT_DTYPES)
    device_map: str | None = option(None, panel=MODEL, outcome=False)
    attn_implementation: str | None = option(None, panel=MODEL, choices=ATTENTION, outcome=False)
    quantize: str | None = option(None, panel=MODEL, choices=QUANTISATIONS)
    trust_remote_code: bool = option(False, panel=MODEL, outcome=False)
    allow_other_base: bool = option(False, panel=MODEL, outcome=False)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(LoadOptions):
    """The base model of a command.

    Attributes:
        model: Base model: folder, hub id or GGUF file (on the hub owner/name:FILE.gguf). Default: the adapter's base,
            else the embedded model.
    """

    model: str | None = option(None, metavar="MODEL", panel=MODEL)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(ModelSettings):
    """The base model and the adapter of a command.

    Attributes:
        adapter: Adapter: folder or hub id.
    """

    adapter: str | None = option(None, metavar="ADAPTER", panel=MODEL, once=True)


_TEMPLATE: Kind[str] = Kind(str, ConfigError, "Give a Jinja file.")
# Python writes these values in another way than JSON.
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True, kw_only=True)
class ChatSettings(Settings):
    """The chat template and what is passed to it.

    Attributes:
        chat_template: File with a chat template (Jinja). Default: that of the adapter, else of the tokenizer.
        chat_template_kwargs: Argument of the chat template, such as enable_thinking=false. Repeatable.
        system_prompt: Text of the system turn of chats without one. Default: that of the chat template, if any.
    """

    chat_template: Path | None = option(None, panel=MODEL, metavar="FILE")
    chat_template_kwargs: tuple[str, ...] = option((), panel=MODEL, metavar="KEY=VALUE")
    system_prompt: str | None = option(None, panel=MODEL, metavar="TEXT")

    def check(self) -> None:
        """Also read the template and its arguments."""
        super().check()
        _ = self.template_text, self.template_defaults

    @cached_property
    def template_text(self) -> str | None:
        """Content of `chat_template`."""
        return None if self.chat_template is None else read(_TEMPLATE, self.chat_template, str)

    @cached_property
    def template_defaults(self) -> str:
        """Jinja statements for the start of a template: its arguments and system turn, if the caller gives none."""
        statements = []
        for pair in self.chat_template_kwargs:
            key, _, text = (part.strip() for part in pair.partition("="))
            if not (key.isidentifier() and text):
                hint = "Such as enable_thinking=false."
                raise ConfigError(f"`{pair}` is not KEY=VALUE", where="--chat-template-kwargs", hint=hint)
            try:
                value: Any = _WORDS[text.lower()] if text.lower() in _WORDS else decode(text)
            except Malformed:
                value = text
            # Jinja reads numbers, texts, lists and objects as Python does.
            statements.append(f"{{% if {key} is not defined %}}{{% set {key} = {value!r} %}}{{% endif %}}")
        if self.system_prompt is not None:
            turn = {"role": "system", "content": self.system_prompt}
            has_none = "not messages or messages[0]['role'] not in ('system', 'developer')"
            statements.append(f"{{% if {has_none} %}}{{% set messages = [{turn!r}] + messages %}}{{% endif %}}")
        return "".join(statements)

    @property
    def changes_template(self) -> bool:
        """Return True if one of the options is set."""
        return self.template_text is not None or bool(self.template_defaults)


@dataclass(frozen=True, kw_only=True)
class DisplaySettings(Settings):
    """Format of results and messages.

    Attributes:
        format: Format of stdout.
        quiet: Disable progress and log messages on stderr.
        debug: Print tracebacks and the logs of all libraries to stderr.
    """

    format: str = option("table", panel=OUTPUT, choices=("table", "json"), display=True)
    quiet: bool = option(False, panel=OUTPUT, display=True)
    debug: bool = option(False, panel=OUTPUT, display=True)

    @property
    def json(self) -> bool:
        """Return True if stdout is JSON."""
        return self.format == "json"


@dataclass(frozen=True, kw_only=True)
class SeedSettings(Settings):
    """Setting that makes a run reproducible.

    Attributes:
        seed: Seed of every random choice.
    """

    seed: int = option(0, min=0, panel=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class OutputSettings(DisplaySettings):
    """Options of most commands.

    Attributes:
        dry_run: Print the resolved settings and stop; writes nothing.
    """

    dry_run: bool = option(False, panel=OUTPUT, display=True)


@dataclass(frozen=True, kw_only=True)
class OverwriteSettings(Settings):
    """Overwriting of an existing output.

    Attributes:
        overwrite: Overwrite an existing output.
    """

    overwrite: bool = option(False, panel=OUTPUT, outcome=False)


@dataclass(frozen=True, kw_only=True)
class UploadSettings(Settings):
    """Upload of an output.

    Attributes:
        push_to_hub: Hub repository (owner/name) for the output.
    """

    push_to_hub: str | None = option(None, panel=OUTPUT, metavar="REPOSITORY", outcome=False)


@dataclass(frozen=True)
class Sampling:
    """Sampling of tokens.

    Attributes:
        max_new_tokens: Maximum number of new tokens per text.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus sampling: total probability of the tokens to sample from.
        top_k: Number of most likely tokens to sample from. Default: all.
        stop: Stop string: the text ends before it. Repeatable.
    """

    max_new_tokens: int = option(50, min=1, panel=GENERATION)
    temperature: float = option(1.0, min=0, panel=GENERATION)
    top_p: float = option(0.9, above=0, max=1, panel=GENERATION)
    top_k: int | None = option(None, min=1, panel=GENERATION)
    seed: int = same_option(SeedSettings, "seed")
    stop: tuple[str, ...] = option((), min=1, panel=GENERATION)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(ChatSettings):
    """Number, length and sampling of generated texts.

    Attributes:
        num_samples: Number of texts per prompt.
        apply_chat_template: Apply the chat template. Default: as in training, and on with options of the template.
    """

    num_samples: int = option(1, min=1, panel=GENERATION)
    max_new_tokens: int = same_option(Sampling, "max_new_tokens")
    temperature: float = same_option(Sampling, "temperature")
    top_p: float = same_option(Sampling, "top_p")
    apply_chat_template: bool | None = option(
        None, panel=GENERATION, flag="--apply-chat-template/--no-apply-chat-template"
    )

    @property
    def uses_template(self) -> bool | None:
        """`apply_chat_template`; by default True if an option of the template is set, else None."""
        return self.changes_template or None if self.apply_chat_template is None else self.apply_chat_template


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(Settings):
    """Scoring of generated texts.

    Attributes:
        reference_model: Reference model for the perplexity of continuations: folder, hub id or GGUF file. Default: the
            base.
        exclude_list_words: Remove the words of the attribute from texts before scoring.
    """

    reference_model: str | None = option(None, panel=SCORING, outcome=False)
    exclude_list_words: bool = option(False, panel=SCORING, outcome=False)


@dataclass(frozen=True, kw_only=True)
class SteeredLayers(Settings):
    """Layers that attributes steer.

    Attributes:
        layers: Layers to steer, such as 8-20,24 or 1- (inclusive, from 0). Default: the layers of the steering vector,
            or all adapted layers for an attribute that the adapter was trained with.
    """

    layers: str | None = option(None, panel=ATTRIBUTES)


@dataclass(frozen=True, kw_only=True)
class FolderSettings(OverwriteSettings):
    """Output folder of a command.

    Attributes:
        output_dir: Folder to write.
    """

    output_dir: Path | None = option(None, outcome=False)
