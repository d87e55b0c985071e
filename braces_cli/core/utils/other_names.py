"""Names of settings in other tools and in earlier versions, for the hints of errors."""

from __future__ import annotations

from collections.abc import Collection

from braces_cli.core.utils.errors import near_misses

# Name in transformers' Trainer, trl, peft, lm-eval, llama.cpp or earlier versions -> candidates; the first one that the
# command has is used.
_SETTING_NAMES: dict[str, tuple[str, ...]] = {
    "against": ("baselines",),
    "alpha": ("lora_alpha", "s"),
    "base_model": ("model",),
    "beside": ("show_unsteered",),
    "bf16": ("dtype",),
    "cutoff_len": ("max_length",),
    "dataset": ("data", "prompts"),
    "dataset_name": ("data", "prompts"),
    "eval_batch_size": ("batch_size",),
    "f": ("prompts",),
    "file": ("prompts", "data"),
    "fp16": ("dtype",),
    "gradient_accumulation_steps": ("gradient_accumulation",),
    "judge_model": ("reference_model",),
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
    """Return the setting in `known` for the name of another tool or of an earlier version, else None."""
    key = name.lstrip("-").replace("-", "_")
    return next((setting for setting in _SETTING_NAMES.get(key, ()) if setting in known), None)


def setting_hint(name: str, known: Collection[str]) -> str:
    """Return a hint with the likely settings in `known`; an empty string if there is none."""
    setting = matching_setting(name, known)
    return f"Use `{setting}`." if setting else near_misses(name, known)
