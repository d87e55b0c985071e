"""Exports of a model type: the columns Merge, Slots, Code, Edit and LoRA of recipes/docs/ARCHITECTURES.md."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.export import checkpoint
from braces_cli.export.code import side_modules, write_checkpoint_with_code
from braces_cli.export.lora import Pairs, lora_pairs, value_pairs, write_folder
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
    paths, added = checkpoint.side_paths(adapter), dict(vectors or {})
    for ffn, adapter_layer in adapter.adapted_ffns:
        if adapter_layer.shift is not None:
            constant = paths[ffn.layer][1] @ adapter_layer.shift
            added[ffn.layer] = constant + added[ffn.layer] if ffn.layer in added else constant
    adapter.detach()
    merge_plan = merge_of(model, adapter.rank, tokens, steered)
    checkpoint.write_checkpoint(folder, model, merge_plan, checkpoint.new_neurons(merge_plan, paths, added))
    return merge_plan


def write_slotted(model: Any, folder: Path, tokens: torch.Tensor, count: int = 16) -> tuple[Slots, Any]:
    """Write a bare base with slots and load it with plain transformers."""
    slots_plan, slots = plan_slots(model, find_ffns(model), count, ids=tokens)
    checkpoint.write_checkpoint(folder, model, slots_plan, empty_slots(slots_plan, slots))
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
    model: Any, attach: Callable[[str], Adapter], logits_of: Any, folder: Path, tolerance: float
) -> list[str]:
    """The cells of a type.

    Args:
        attach: puts an adapter of rank 4 on the model, with relevance to `input` or `output`.
        logits_of: logits of a model for fixed tokens.
        tolerance: relative difference that is still rounding."""
    kinds = {
        merge_column: "input", slots_column: "input", code_column: "input", edit_column: "output", lora_column: "output"
    }  # fmt: skip
    return [
        kind(model, lambda to=to: attach(to), logits_of, folder / kind.__name__, tolerance)
        for kind, to in kinds.items()
    ]


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
    path = checkpoint.side_paths(adapter)
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


def edit_column(model: Any, attach: Any, logits_of: Any, folder: Path, tolerance: float) -> str:
    """Merge of relevance to the output: `yes`, `yes, without attributes`, or the reason of its refusal."""
    ffns, before = find_ffns(model), copy.deepcopy(model.state_dict())
    for shift in (SHIFT, None):
        adapter = frozen(attach(), shift)
        expected = logits_of(model)
        try:
            missing = checkpoint.edit_values(model, checkpoint.value_edits(adapter, ffns, {}))
        except ModelError as error:
            return "no: " + error.message.partition("cannot be merged: ")[2]
        finally:
            adapter.detach()
        try:
            name = checkpoint.write_edited(folder, model, ffns, missing, TOKENS)
        except ModelError:
            continue
        finally:
            model.load_state_dict(before)
        kind = type(model) if name == type(model).__name__ else getattr(transformers, name)
        loaded, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        found = _relative(logits_of(loaded.eval()), expected)
        assert found < tolerance, f"with edited value vectors it differs from the adapter by {found:.1e}"
        return "yes" if shift is not None else "yes, without attributes"
    raise AssertionError("unreachable")


def lora_column(model: Any, attach: Any, logits_of: Any, folder: Path, tolerance: float) -> str:
    """LoRA of relevance to the output, with an attribute, on the unchanged base in peft: `yes` or `no`."""
    ffns, adapter = find_ffns(model), frozen(attach(), SHIFT)
    expected = logits_of(model)
    try:
        pairs, biases = value_pairs(model, list(checkpoint.value_edits(adapter, ffns, {})), True, True)
    except ModelError:
        return "no"
    finally:
        adapter.detach()
    write_folder(folder, pairs, "float32", "base", biases)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    found = _relative(logits_of(loaded), expected)
    assert found < tolerance, f"with a LoRA it differs from the adapter by {found:.1e}"
    return "yes"


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
