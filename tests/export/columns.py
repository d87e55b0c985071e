"""Exports of a model type: the columns Merge, Slots and Code of recipes/docs/ARCHITECTURES.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.export.checkpoint import new_neurons, side_paths, write_checkpoint
from braces_cli.export.code import side_modules, write_checkpoint_with_code
from braces_cli.export.lora import Pairs, lora_pairs
from braces_cli.export.plan import Plan, ffn_form, plan
from braces_cli.export.slots import Slots, empty_slots, plan_slots
from tests.export.models import SHIFT, frozen

TOKENS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))


def merge_of(model: Any, rank: int, tokens: torch.Tensor, steered: bool) -> Plan:
    """Plan the merge of an adapter."""
    ffns, form = ffn_form(model, find_ffns(model), tokens)
    return plan(model, ffns, form, rank * (1 if form.gated else 2), 64, ["value"] if steered else [])


def write_merged(
    model: Any,
    adapter: Adapter,
    folder: Path,
    tokens: torch.Tensor,
    steered: bool,
    vectors: dict[int, torch.Tensor] | None = None,
) -> Plan:
    """Merge an attached adapter with its current shift and steering vectors, and detach the adapter."""
    paths, added = side_paths(adapter), dict(vectors or {})
    for ffn, adapter_layer in adapter.adapted_ffns:
        if adapter_layer.shift is not None:
            constant = paths[ffn.layer][1] @ adapter_layer.shift
            added[ffn.layer] = constant + added[ffn.layer] if ffn.layer in added else constant
    adapter.detach()
    merge_plan = merge_of(model, adapter.rank, tokens, steered)
    write_checkpoint(folder, model, merge_plan, new_neurons(merge_plan, paths, added))
    return merge_plan


def write_slotted(model: Any, folder: Path, tokens: torch.Tensor, count: int = 16) -> tuple[Slots, Any]:
    """Write a bare base with slots and load it with plain transformers."""
    slots_plan, slots = plan_slots(model, find_ffns(model), count, ids=tokens)
    write_checkpoint(folder, model, slots_plan, empty_slots(slots_plan, slots))
    name = slots_plan.architecture
    kind = type(model) if name == type(model).__name__ else getattr(transformers, name)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return slots, loaded.eval()


def add_lora(model: Any, pairs: Pairs, scale: float = 1.0) -> None:
    """Add a LoRA to the modules of a model: output plus scale times B (A x)."""
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
        tolerance: relative difference that is still rounding."""
    kinds = (merge_column, slots_column, code_column)
    cells = [kind(model, attach, logits_of, folder / kind.__name__, tolerance) for kind in kinds]
    return cells[0], cells[1], cells[2]


def merge_column(model: Any, attach: Any, logits_of: Any, folder: Path, tolerance: float) -> str:
    """Case of a merge, `a`, `b` or `c` of `export.plan`, or the reason of its refusal."""
    steered = True
    try:
        try:
            merge_of(model, 4, TOKENS, True)
        except ModelError:
            steered = False
            merge_of(model, 4, TOKENS, False)
    except ModelError as error:
        return "no: " + error.message.partition("cannot be merged: ")[2]
    adapter = frozen(attach(), SHIFT if steered else None)
    expected = logits_of(model)
    merge_plan = write_merged(model, adapter, folder, TOKENS, steered)
    name = merge_plan.architecture
    kind = type(model) if name == type(model).__name__ else getattr(transformers, name)
    found = _relative(logits_of(kind.from_pretrained(folder).eval()), expected)
    assert found < tolerance, f"merged, it differs from the adapter by {found:.1e}"
    return merge_plan.case if steered else f"{merge_plan.case}, without steering"


def slots_column(model: Any, attach: Any, logits_of: Any, folder: Path, tolerance: float) -> str:
    """Support of slots and LoRA files: `yes`, `yes, without attributes`, or `no`."""
    bare = logits_of(model)
    try:
        slots, loaded = write_slotted(model, folder, TOKENS)
    except ModelError:
        return "no"
    assert _relative(logits_of(loaded), bare) < tolerance, "empty slots change the base"
    adapter = frozen(attach(), None)
    path = side_paths(adapter)
    constant = {layer: b @ SHIFT for layer, (_, b) in path.items()} if slots.constant else {}
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
    """Export with a modelling file: `yes`, or `yes, by hooks` if the FFN is not a separate module."""
    model.save_pretrained(folder / "base")
    adapter = frozen(attach(), SHIFT)
    expected = logits_of(model)
    sides = side_modules(adapter)
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
