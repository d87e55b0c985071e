"""What can be exported of a model of any type: the columns Merge, Slots and Code of recipes/docs/ARCHITECTURES.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.export.checkpoint import new_neurons, write_checkpoint
from braces_cli.export.code import side_paths, write_checkpoint_with_code
from braces_cli.export.form import observed_form
from braces_cli.export.lora import Pairs, lora_pairs, side_path
from braces_cli.export.planner import plain_ffns, plan
from braces_cli.export.slots import Slots, plan_slots, write_empty

SHIFT = torch.tensor([1.0, -2.0, 0.5, 3.0])
TOKENS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))


def frozen(adapter: Adapter, shift: torch.Tensor | None) -> Adapter:
    """The adapter with its factors fixed, and every layer steered where `shift` (d_r,) is given."""
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.requires_grad_(False)
        adapter_layer.shift = shift
    return adapter


def vectors(adapter: Adapter, slots: Slots, strength: float) -> dict[int, torch.Tensor]:
    """What steering by `strength * SHIFT` adds to the FFN output of each layer."""
    path = side_path(adapter)
    return {layer: strength * (writes @ SHIFT) for layer, (_, writes) in path.items()} if slots.constant else {}


def write_slotted(model: Any, folder: Path, tokens: torch.Tensor, count: int = 16) -> tuple[Slots, Any]:
    """Write a bare base with slots and load it as plain transformers does.

    Raises:
        ModelError: it takes none.
    """
    ffns: Sequence[FFN] = plain_ffns(model, find_ffns(model))
    made, slots = plan_slots(model, list(ffns), observed_form(model, ffns, tokens), count)
    write_empty(folder, model, made, slots, list(ffns))
    kind = type(model) if made.architecture == type(model).__name__ else getattr(transformers, made.architecture)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return slots, loaded.eval()


def add_lora(model: Any, pairs: Pairs, scale: float = 1.0) -> None:
    """Add a LoRA to a model's modules the way servers do: what the module gives plus scale times B (A x)."""
    modules = dict(model.named_modules())
    for name, (a, b) in pairs.items():

        def hook(module: Any, args: tuple, output: torch.Tensor, a: Any = a, b: Any = b) -> torch.Tensor:
            return output + scale * (args[0] @ a.to(args[0]).mT @ b.to(args[0]).mT)

        modules[name].register_forward_hook(hook)


def export_columns(
    model: Any, attach: Callable[[], Adapter], logits_of: Any, folder: Path, tolerance: float
) -> tuple[str, str, str]:
    """The three cells of a type.

    Args:
        attach: puts an adapter of rank 4 on the model.
        logits_of: logits of a model for fixed tokens.
        tolerance: relative difference that is still rounding.

    Raises:
        AssertionError: an export gives other logits than base and adapter.
    """
    kinds = (merge_column, slots_column, code_column)
    cells = [kind(model, attach, logits_of, folder / kind.__name__, tolerance) for kind in kinds]
    return cells[0], cells[1], cells[2]


def merge_column(model: Any, attach: Any, logits_of: Any, folder: Path, tolerance: float) -> str:
    """How an adapter merges into a type, `a`, `b` or `c` of `export.planner`, or why not.

    Raises:
        AssertionError: the merged checkpoint gives other logits than the adapter.
    """
    ffns = find_ffns(model)
    try:
        plain = plain_ffns(model, ffns)
        shape = observed_form(model, plain, TOKENS)
        try:
            made, steered = plan(model, ffns, shape, 4, 64, True), True
        except ModelError:
            made, steered = plan(model, ffns, shape, 4, 64, False), False
    except ModelError as error:
        return "no: " + error.message.partition("cannot be merged: ")[2]
    adapter = frozen(attach(), SHIFT if steered else None)
    expected = logits_of(model)
    neurons = new_neurons(adapter, made)
    adapter.detach()
    write_checkpoint(folder, model, made, neurons, [ffn.layer for ffn in plain])
    kind = type(model) if made.architecture == type(model).__name__ else getattr(transformers, made.architecture)
    found = _relative(logits_of(kind.from_pretrained(folder).eval()), expected)
    assert found < tolerance, f"merged, it differs from the adapter by {found:.1e}"
    return made.case if steered else f"{made.case}, without steering"


def slots_column(model: Any, attach: Any, logits_of: Any, folder: Path, tolerance: float) -> str:
    """Whether a type takes slots and LoRA files, `yes`, `yes, without attributes`, or `no`.

    Raises:
        AssertionError: it gives other logits than base or adapter.
    """
    bare = logits_of(model)
    try:
        slots, loaded = write_slotted(model, folder, TOKENS)
    except ModelError:
        return "no"
    assert _relative(logits_of(loaded), bare) < tolerance, "empty slots change the base"
    adapter = frozen(attach(), None)
    path, constant = side_path(adapter), vectors(adapter, slots, 1.0)
    frozen(adapter, 2 * SHIFT if constant else None)
    expected = logits_of(model)
    adapter.detach()
    add_lora(loaded, lora_pairs(path, {}, slots))
    if constant:
        add_lora(loaded, lora_pairs({}, constant, slots), 2.0)
    found = _relative(logits_of(loaded), expected)
    assert found < tolerance, f"with LoRA files it differs from the adapter by {found:.1e}"
    return "yes" if constant else "yes, without attributes"


def code_column(model: Any, attach: Any, logits_of: Any, folder: Path, tolerance: float) -> str:
    """How a type is written with a modelling file: `yes`, `yes, by hooks` where an FFN has no module of its own.

    Raises:
        AssertionError: it gives other logits than the adapter.
    """
    model.save_pretrained(folder / "base")
    adapter = frozen(attach(), SHIFT)
    expected = logits_of(model)
    sides = side_paths(adapter)
    adapter.detach()
    write_checkpoint_with_code(folder / "code", model, sides, folder / "base")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder / "code", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    found = _relative(logits_of(loaded.eval()), expected)
    assert found < tolerance, f"as a checkpoint with code it differs from the adapter by {found:.1e}"
    return "yes, by hooks" if any(side.kind == "ends" for side in sides) else "yes"


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
