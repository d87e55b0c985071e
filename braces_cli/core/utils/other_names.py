"""What other tools of the field call the settings, so that a name brought from there is answered with ours."""

from __future__ import annotations

from collections.abc import Collection

from braces_cli.core.utils.errors import near_misses

# Name in transformers' Trainer, trl, peft, lm-eval or llama.cpp -> ours; where commands differ, the first that one has.
_OURS: dict[str, tuple[str, ...]] = {
    "alpha": ("lora_alpha", "s"),
    "base_model": ("model",),
    "bf16": ("dtype",),
    "cutoff_len": ("max_length",),
    "dataset": ("data", "prompts"),
    "dataset_name": ("data", "prompts"),
    "eval_batch_size": ("batch_size",),
    "f": ("prompts",),
    "file": ("prompts", "data"),
    "fp16": ("dtype",),
    "gradient_accumulation_steps": ("gradient_accumulation",),
    "learning_rate": ("lr",),
    "load_in_4bit": ("quantize",),
    "load_in_8bit": ("quantize",),
    "lora": ("adapter",),
    "lora_r": ("rank",),
    "lora_target_modules": ("lora_targets",),
    "lr_scheduler_type": ("schedule",),
    "m": ("model",),
    "max_seq_len": ("max_length",),
    "max_seq_length": ("max_length",),
    "max_tokens": ("max_new_tokens",),
    "model_args": ("model",),
    "model_name": ("model",),
    "model_name_or_path": ("model",),
    "n": ("max_new_tokens",),
    "n_predict": ("max_new_tokens",),
    "num_epochs": ("epochs",),
    "num_return_sequences": ("num_samples",),
    "num_train_epochs": ("epochs",),
    "o": ("output", "output_dir"),
    "out": ("output_dir", "output"),
    "output_path": ("output", "output_dir"),
    "p": ("prompt",),
    "peft": ("adapter",),
    "per_device_eval_batch_size": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "pretrained": ("model",),
    "r": ("rank",),
    "resume_from_checkpoint": ("resume",),
    "scale": ("s",),
    "strength": ("s",),
    "target_modules": ("lora_targets",),
    "temp": ("temperature",),
    "torch_dtype": ("dtype",),
    "train_data": ("data",),
    "train_file": ("data",),
    "validation_file": ("eval_data",),
}


def matching_setting(name: str, known: Collection[str]) -> str | None:
    """The setting of `known` that other tools call `name`, which may be written as an option; None where none is."""
    key = name.lstrip("-").replace("-", "_")
    return next((ours for ours in _OURS.get(key, ()) if ours in known), None)


def setting_hint(name: str, known: Collection[str]) -> str:
    """Which settings of `known` may be meant by `name`; an empty string where none resembles it."""
    ours = matching_setting(name, known)
    return f"Here it is `{ours}`." if ours else near_misses(name, known)
