"""PEFT baselines: LoRA, its variants and any config of peft, trained by the same command on the same batches.

The output folder is that of peft: `PeftModel.from_pretrained(base, folder)` loads it without `braces`.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, AdapterConfig
from braces_cli.core.errors import BracesError, ConfigError, first_line, logger, near_misses
from braces_cli.core.files import scratch_folder, write_json, write_tensors, write_text
from braces_cli.core.schema import WRITTEN, cut, read
from braces_cli.training.settings import TrainSettings

# Arguments of `LoraConfig` for each preset, in addition to those that settings have.
_PRESETS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
_TARGETS = ("q_proj", "v_proj")
# Initial weights that change the base. The file holds the difference to the start, which is a LoRA of twice the rank.
_CHANGE_BASE = ("pissa", "olora")
_NOT_CONVERTED = ("use_dora", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern")
_NEED_DATA = ("eva", "corda", "loftq", "lora_ga")
_UNTRAINED = {
    "ADALORA": "needs a call after each step",
    **dict.fromkeys(("ADAMSS", "FROD", "SHIRA"), "has no size without the weights of the base"),
}
_UNSUPPORTED = {
    "alora_invocation_tokens": "rows do not contain these tokens",
    "arrow_config": "it combines other adapters",
    "monteclora_config": "it adds a term to the loss",
}
# Keys of a saved config that a new run replaces.
_REPLACED = (
    "task_type", "inference_mode", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"
)  # fmt: skip
# Raised by peft for values that it checks while it builds the layers.
_REJECTED = (
    ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, ImportError, RuntimeError
)  # fmt: skip


class PeftAdapter:
    """A PEFT adapter with the interface of `core.adapter.model.Adapter` that training uses.

    Args:
        model: the base; its modules are replaced in place, its parameters frozen.
        settings: `method` is a preset or a config of peft.
        layers: decoder layers to adapt, None for all.

    Raises:
        ConfigError: peft refuses the config, or the model has no module of the targets' names.
    """

    # No relevance modules, no attributes.
    adapted_ffns: tuple = ()
    scales: tuple[float, ...] = ()
    mlp = None

    def __init__(self, model: nn.Module, settings: TrainSettings, layers: Sequence[int] | None) -> None:
        self.model = model
        self.layers = list(layers or ())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # logged by `baseline_parameters`
            self._wrapper = _inject(model, settings, layers)
        options = self._wrapper.peft_config["default"]
        self.rank = getattr(options, "r", None) or 0
        self.method = settings.method if settings.peft_file is None else options.peft_type.value.lower()
        self._initial: dict[str, Tensor] | None = None
        if str(getattr(options, "init_lora_weights", None)).startswith(_CHANGE_BASE):
            self._initial = {name: tensor.clone() for name, tensor in self.tensors().items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters by their names in the wrapped model."""
        return ((name, p) for name, p in self._wrapper.named_parameters() if p.requires_grad)

    def tensors(self, in_place: bool = True) -> dict[str, Tensor]:
        """Weights of the adapter by peft's names; `in_place` has no effect."""
        from peft import get_peft_model_state_dict

        return {
            name: tensor.detach()
            for name, tensor in get_peft_model_state_dict(self._wrapper, save_embedding_layers=False).items()
        }

    def save(self, folder: Path, config: AdapterConfig, card: str) -> None:
        """Write a PEFT folder for an unchanged base: weights and model card first, the config last."""
        from safetensors.torch import load_file

        with scratch_folder() as work:
            start, written = work / "start", work / "out"
            conversion: dict[str, str] = {}
            if self._initial is not None:
                self._write(start)
                write_tensors(start / WEIGHTS_FILE, self._initial)
                conversion = {"path_initial_model_for_weight_conversion": str(start)}
            self._write(written, **conversion)
            options, tensors = read(WRITTEN, written / CONFIG_FILE), load_file(written / WEIGHTS_FILE)
        if isinstance(options.get("target_modules"), list):
            options["target_modules"].sort()  # a set in peft: its order differs between processes
        options |= {"base_model_name_or_path": config.base_model_name_or_path, "revision": config.revision}
        write_tensors(folder / WEIGHTS_FILE, tensors)
        write_text(folder / CARD_FILE, card)
        write_json(folder / CONFIG_FILE, options)

    def _write(self, folder: Path, **conversion: str) -> None:
        """Write a folder with peft.

        Raises:
            OSError: the disk is full.
        """
        from safetensors import SafetensorError

        try:
            self._wrapper.save_pretrained(folder, save_embedding_layers=False, **conversion)
        except SafetensorError as error:
            raise BracesError(f"cannot write: {error}", where=str(folder), hint="Check the disk.") from error


def baseline_parameters(model: nn.Module, settings: TrainSettings, layers: Sequence[int] | None) -> int:
    """Number of parameters that a baseline trains on `model`, which is unchanged and may be on the meta device.

    Warnings of peft about the config are logged.
    """
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        wrapper = _inject(copy.deepcopy(model), settings, layers)
    for text in dict.fromkeys(str(each.message) for each in found if each.category is UserWarning):
        logger.warning("%s: %s", settings.method, text)
    count = sum(p.numel() for p in wrapper.parameters() if p.requires_grad)
    if count == 0:
        raise ConfigError("the config trains no parameter", where=str(settings.peft_file), hint="Correct the file.")
    return count


def _inject(model: nn.Module, settings: TrainSettings, layers: Sequence[int] | None) -> Any:
    """Wrap `model` with peft."""
    from peft import get_peft_model

    on_meta = next(model.parameters()).is_meta
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # GPT-2 stores its weights transposed; peft handles this, with a warning.
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
            torch.manual_seed(settings.seed)
            return get_peft_model(model, _config(model, settings, layers), low_cpu_mem_usage=on_meta)
    except _REJECTED as error:
        raise ConfigError(
            f"peft refuses the config: {first_line(error, 120)}",
            where="--lora-targets" if settings.peft_file is None else str(settings.peft_file),
            hint=f"The model has: {', '.join(linear[:12])}.",
        ) from error


def _config(model: nn.Module, settings: TrainSettings, layers: Sequence[int] | None) -> Any:
    """Config of peft for a preset or a file."""
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if settings.peft_file is not None:
        options, where = settings.peft_options, str(settings.peft_file)
        name, kinds = options["peft_type"], {kind.value: of for kind, of in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if name not in kinds:
            hint = near_misses(name.upper(), kinds) or "Update peft, or correct the name."
            raise ConfigError(f"`peft_type`: peft has no `{cut(name)}`", where=where, hint=hint)
        _check_options(options, where)
        kept = {key: value for key, value in options.items() if key not in _REPLACED}
        return kinds[name](**kept, task_type="CAUSAL_LM", inference_mode=False)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    # Without queries and values of these names peft uses its default for the architecture.
    default = list(_TARGETS) if names.issuperset(_TARGETS) else None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.lora_alpha if settings.lora_alpha is not None else 2 * settings.rank,
        target_modules=list(settings.lora_targets) or default,
        layers_to_transform=None if layers is None else list(layers),
        **_PRESETS[settings.method],
    )


def _check_options(options: dict[str, Any], where: str) -> None:
    """Refuse options of peft that `braces train` cannot follow."""
    init = str(options.get("init_lora_weights"))
    faults = {key: reason for key, reason in _UNSUPPORTED.items() if options.get(key)}
    if init.startswith(_CHANGE_BASE):
        faults |= {key: f"cannot be combined with {init}" for key in _NOT_CONVERTED if options.get(key)}
        if options.get("bias", "none") != "none":
            faults["bias"] = f"cannot be combined with {init}"
    if init in _NEED_DATA:
        faults["init_lora_weights"] = f"{init} needs a pass over data before training"
    if options["peft_type"] in _UNTRAINED:
        faults["peft_type"] = f"{options['peft_type']} {_UNTRAINED[options['peft_type']]}"
    for key, reason in faults.items():
        hint = "Train it with peft; `braces eval` measures the result."
        raise ConfigError(f"`{key}`: {reason}", where=where, hint=hint)
