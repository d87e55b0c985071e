"""PEFT baselines: LoRA and its variants, trained by the same command on the same batches.

The output folder is that of peft: `PeftModel.from_pretrained(base, folder)` loads it without `braces`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, AdapterConfig
from braces_cli.core.errors import BracesError, ConfigError
from braces_cli.core.files import scratch_folder, write_json, write_tensors, write_text
from braces_cli.core.schema import WRITTEN, read
from braces_cli.training.settings import TrainSettings

# Arguments of `LoraConfig` for each method.
_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
_TARGETS = ("q_proj", "v_proj")


class PeftAdapter:
    """A PEFT adapter with the interface of `core.adapter.model.Adapter` that training uses.

    Args:
        model: the base; its modules are replaced in place, its parameters frozen.
        settings: `method` is one of `settings.BASELINES`.
        layers: decoder layers to adapt, None for all.

    Raises:
        ConfigError: peft is not installed, or the model has no module of the targets' names.
    """

    # No relevance modules, no attributes.
    adapted_ffns: tuple = ()
    scales: tuple[float, ...] = ()
    mlp = None

    def __init__(self, model: nn.Module, settings: TrainSettings, layers: Sequence[int] | None) -> None:
        self.model = model
        self.rank = settings.rank
        self.layers = list(layers or ())
        self._wrapper = _inject(model, settings, layers, _OPTIONS[settings.method])
        self._initial: dict[str, Tensor] | None = None
        if settings.method == "pissa":
            # PiSSA changes the base. The file holds the difference to its start, which is a LoRA of twice the rank.
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
    """Number of parameters that a baseline trains on `model`, which is unchanged and may be on the meta device."""
    options = {key: value for key, value in _OPTIONS[settings.method].items() if key != "init_lora_weights"}
    wrapper = _inject(copy.deepcopy(model), settings, layers, options)
    return sum(p.numel() for p in wrapper.parameters() if p.requires_grad)


def _inject(model: nn.Module, settings: TrainSettings, layers: Sequence[int] | None, options: dict[str, Any]) -> Any:
    """Wrap `model` with peft."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        hint = "Install it with: pip install peft"
        what = f"`{settings.method}` needs peft, which is not installed"
        raise ConfigError(what, where="--method", hint=hint) from error
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    # Without queries and values of these names peft uses its default for the architecture.
    default = list(_TARGETS) if names.issuperset(_TARGETS) else None
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.lora_alpha if settings.lora_alpha is not None else 2 * settings.rank,
        target_modules=list(settings.lora_targets) or default,
        layers_to_transform=None if layers is None else list(layers),
        lora_dropout=0.0,
        **options,
    )
    on_meta = next(model.parameters()).is_meta
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # GPT-2 stores its weights transposed; peft handles this, with a warning.
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
            torch.manual_seed(settings.seed)
            return get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"{settings.method} finds nothing to adapt: {str(error).splitlines()[0][:120]}",
            where="--lora-targets",
            hint=f"The model has: {', '.join(linear[:12])}.",
        ) from error
