"""Systems of an evaluation: a base, adapters on it (braces or PEFT), and each of them steered.

PEFT replaces modules of the base in place and restores the original modules, so one loaded base serves all adapters.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from braces_cli.core.adapter import files
from braces_cli.core.adapter import model as sessions
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError, ModelError, first_line, logger
from braces_cli.core.files import path_exists
from braces_cli.core.models.weights import check_finite
from braces_cli.core.schema import read
from braces_cli.evaluation.results import Scores

BRACES = "braces"
# Raised by PEFT for files that are damaged or do not fit the base; the warning is for missing weights.
_PEFT_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError, UserWarning
)  # fmt: skip


@dataclass(frozen=True)
class EvalAdapter:
    """An adapter on disk.

    Attributes:
        name: folder or hub id, as the user gave it.
        method: `braces`, or the PEFT type in lower case (`lora`, `ia3`, ...).
        base: name of the base it was trained on.
        revision: revision of that base, if known.
        sha256: hash of its config and weights.
        chat_template: whether it was trained with the chat template; None if unknown.
        stored: files of a braces adapter, read and checked; None for PEFT.
    """

    name: str
    folder: Path
    method: str
    base: str | None
    revision: str | None
    sha256: str
    chat_template: bool | None = None
    stored: files.StoredAdapter | None = None


@dataclass
class System:
    """A base or an adapter on it, steered or not, with its scores.

    Attributes:
        adapter: None for the base.
        terms: attributes with their strengths; empty if the system is not steered.
    """

    name: str
    adapter: EvalAdapter | None = None
    terms: Sequence[tuple[Attribute, float]] = ()
    scores: Scores = field(default_factory=Scores)

    @property
    def strengths(self) -> dict[str, float]:
        """Attribute -> strength."""
        return {attribute.name: s for attribute, s in self.terms}


def find_eval_adapter(name: str) -> EvalAdapter:
    """Read an adapter given as a folder or hub id; loads no model."""
    folder = files.adapter_folder(name)
    config_file = folder / files.CONFIG_FILE
    raw = read(files.ANY_CONFIG, config_file) if path_exists(config_file) else {}
    if "peft_type" not in raw or raw.get("method") == BRACES:
        stored = files.StoredAdapter(name, folder, files.read_config(folder))
        config, _ = stored.config, stored.tensors  # damaged weights fail here, not after an hour of evaluation
        named, chat = config.base_model_name_or_path, config.training.get("chat_template")
        return EvalAdapter(name, folder, BRACES, named, config.revision, files.adapter_hash(folder), chat, stored)
    hint = "Measure it with lm-eval: --model hf --model_args pretrained=...,peft=..."
    peft_config = files.check_peft_config(raw, str(config_file), ModelError, hint)
    if not (folder / files.WEIGHTS_FILE).is_file():
        hint = f"Save it with peft as {files.WEIGHTS_FILE}; other formats can run code when loaded."
        raise ModelError(f"no {files.WEIGHTS_FILE} here", where=str(folder), hint=hint)
    method, base = peft_config["peft_type"].lower(), peft_config.get("base_model_name_or_path")
    return EvalAdapter(name, folder, method, base, peft_config.get("revision"), files.adapter_hash(folder))


def resolve_base(model: str | None, revision: str | None, adapters: Sequence[EvalAdapter]) -> tuple[str, str | None]:
    """Return name and revision of the requested base, else of the first adapter's, else of the embedded model."""
    if model is not None or not adapters:
        return sessions.base_name(model, None), revision
    base = adapters[0].base
    if base is None:
        raise ConfigError("the adapter does not name its base", where="--model", hint="Give a folder or hub id.")
    return sessions.stored_base(base, adapters[0].name), revision or adapters[0].revision


@contextmanager
def attached(session: Session, adapter: EvalAdapter | None) -> Iterator[None]:
    """Attach the adapter inside the `with` block; afterwards the base is bit-identical to before."""
    if adapter is None:
        yield
    elif adapter.stored is not None:
        with sessions.attached(session, adapter.stored):
            yield
    else:
        with _peft(session.base.model, adapter):
            yield


@contextmanager
def bare(session: Session) -> Iterator[None]:
    """Disable the adapter, of braces or PEFT, inside the `with` block."""
    with ExitStack() as stack:
        if session.adapter is not None:
            stack.enter_context(session.adapter.disabled())
        for module in session.base.model.modules():
            # `original_module`: whole layers that a PEFT adapter replaces.
            if hasattr(module, "enable_adapters") and {"base_layer", "original_module"} & module._modules.keys():
                module.enable_adapters(False)
                stack.callback(module.enable_adapters, True)
        yield


@contextmanager
def _peft(model: Any, adapter: EvalAdapter) -> Iterator[None]:
    from peft import PeftModel, get_peft_model_state_dict

    modules = dict(model.named_modules())
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wrapped: Any = None
    # PiSSA and OLoRA, named here, change the weights of the base in place.
    named = isinstance(read(files.ANY_CONFIG, adapter.folder / files.CONFIG_FILE).get("init_lora_weights"), str)
    weights = [(parameter, parameter.detach().clone()) for parameter in model.parameters()] if named else []
    try:
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                warnings.filterwarnings("error", ".*missing adapter keys")
                wrapped = PeftModel.from_pretrained(model, str(adapter.folder), use_safetensors=True)
        except _PEFT_ERRORS as error:
            what = f"this {adapter.method} adapter does not fit the base: {first_line(error, 400)}"
            hint = f"It was trained on {adapter.base}." if adapter.base else "Was it trained on this base?"
            raise ModelError(what, where=adapter.name, hint=hint) from error
        for text in dict.fromkeys(str(each.message) for each in found if each.category is UserWarning):
            logger.warning("%s: %s", adapter.name, text)
        check_finite(get_peft_model_state_dict(wrapped, save_embedding_layers=False), adapter.name)
        wrapped.eval()
        # lm-eval ties the weights again, which would replace a wrapped embedding or the head.
        model.tie_weights = lambda *args, **kwargs: None
        yield
    finally:
        if hasattr(getattr(wrapped, "base_model", None), "unload"):
            wrapped.unload()
        # Restore the modules of the base if loading failed half-way or the adapter replaced whole layers
        # (`modules_to_save`, to which PEFT unloads).
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            if name and getattr(modules[parent], leaf, None) is not module:
                setattr(modules[parent], leaf, module)
        for parameter, weight in weights:
            parameter.data = weight
        for name in ("peft_config", "tie_weights"):
            model.__dict__.pop(name, None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def labels(adapters: Sequence[EvalAdapter]) -> list[str]:
    """Return a different name for each adapter: that of its folder if unique, else the full name with a number."""
    short = [Path(each.name).name or each.name for each in adapters]
    found: list[str] = []
    for number, (brief, each) in enumerate(zip(short, adapters, strict=True), 1):
        label = brief if short.count(brief) == 1 and brief != "base" else each.name
        found.append(label if label not in (*found, "base") else f"{label} ({number})")
    return found
