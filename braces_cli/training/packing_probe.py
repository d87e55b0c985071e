"""Whether the very model at hand can be packed: a probe at the start of a run, and the layout that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from braces_cli.core.models.ffn import parameter_total
from braces_cli.core.models.loading import input_device
from braces_cli.core.models.tokenization import Encoded, context_length
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError
from braces_cli.training.collator import GROUPS, Layout, pack
from braces_cli.training.selective_logits import MODEL_FAULTS, can_pick
from braces_cli.training.settings import TrainSettings

logger = logging.getLogger("braces")

# What packed and unpacked logits may differ by, over the largest logit: rounding in the order of sums.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOLERANCE_FLOAT32 = 1e-4
# A masked score of attention takes so many times as long as the same flops in a linear layer (two cores, float32).
MASKED = 4.0
# Tokens of an example that the probe looks at.
PROBE_TOKENS = 512
# Tokens a row of the probe whether logits can be picked.
PICKED = 8
FLASH = "flash_attention_2"


def choose_layout(session: Session, settings: TrainSettings, items: Sequence[Encoded]) -> Layout:
    """How the examples of a batch lie in blocks, and whether logits are computed of scored tokens only.

    Raises:
        ConfigError: packing is asked for, and the probe found a difference.
    """
    layout, model = _blocks(session, settings, items), session.base.model
    picks = can_pick(model, probe_items(items)[1][:PICKED], _tolerance(model))
    return replace(layout, only_scored=picks, contrast=bool(settings.contrast))


def _blocks(session: Session, settings: TrainSettings, items: Sequence[Encoded]) -> Layout:
    """Packed where the probe allows it, else grouped by length; FlashAttention is turned on where it is installed.

    Args:
        settings: of these `packing`: `on` makes it an error that the model cannot be packed, `off` asks for groups.
        items: examples as they will be trained on, at least one.

    Raises:
        ConfigError: `on`, and the probe found a difference.
    """
    # Activations computed again in the backward pass must find the attributes of their own block still set.
    one = settings.gradient_checkpointing and settings.attribute_field is not None
    grouped = Layout(packed=False, groups=1 if one else GROUPS)
    if settings.packing == "off":
        return grouped
    model = session.base.model
    pad_id = session.base.tokenizer.pad_token_id
    probe = probe_items(items)
    if _try_flash(model, probe, pad_id):
        return Layout(packed=True)
    fault = packing_fault(model, probe, pad_id)
    if fault is None:
        cost = attention_cost(model, len(session.ffns), session.ffns[0].hidden_size)
        if _is_flash(model):
            return Layout(packed=True)
        return Layout(packed=True, attention=cost, context=context_length(model.config, session.base.tokenizer))
    if settings.packing == "on":
        hint = "Use --packing auto: examples are grouped by length instead."
        raise ConfigError(f"this model cannot be packed: {fault}", where="--packing on", hint=hint)
    logger.info("examples are not packed but grouped by length: %s", fault)
    return grouped


def attention_cost(model: Any, layers: int, width: int) -> float:
    """What each token of a row adds to the cost of another, over what a token costs in the linear layers."""
    return MASKED * 4 * layers * width / (2 * parameter_total(model))


def probe_items(items: Sequence[Encoded]) -> list[list[int]]:
    """Tokens of three examples: a middling one, the longest and the shortest, or the same again where there are few."""
    order = sorted(items, key=lambda item: len(item.ids))
    return [list(order[place].ids[:PROBE_TOKENS]) for place in (len(order) // 2, -1, 0)]


def packing_fault(model: Any, probe: Sequence[list[int]], pad_id: int) -> str | None:
    """What is wrong with the logits of packed examples, None where nothing is.

    Each example packed is held to itself alone; and other tokens in the first may not move the logits of the rest.
    """
    tolerance = _tolerance(model)
    rows = [[0, 1, 2]] if _is_flash(model) else [[0, 1], [2]]
    first, *rest = probe
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [_alone(model, ids) for ids in probe]
            packed = _packed(model, probe, rows, pad_id)
            other = _packed(model, [[(token + 1) % _vocabulary(model) for token in first], *rest], rows, pad_id)
    except MODEL_FAULTS as error:
        # A forward pass that takes no positions, or none that start anew.
        return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    finally:
        model.train(was_training)
    apart = max(map(_relative, packed, alone))
    if not apart <= tolerance:
        return f"packed logits differ by {apart:.1e} from those of the same examples alone"
    leak = max(map(_relative, other[1:], packed[1:]))
    if not leak <= tolerance / 3:
        return f"an example moves the logits of the next one by {leak:.1e}"
    return None


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE_FLOAT32)


def _try_flash(model: Any, probe: Sequence[list[int]], pad_id: int) -> bool:
    """Turn FlashAttention on where it is installed, fits and passes the probe."""
    half = next(model.parameters()).dtype in TOLERANCE
    if not (half and input_device(model).type == "cuda" and is_flash_attn_2_available()) or _is_flash(model):
        return False
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(FLASH)
        fault = packing_fault(model, probe, pad_id)
    except (ValueError, ImportError, RuntimeError) as error:
        fault = str(error).splitlines()[0]
    if fault is None:
        return True
    model.set_attn_implementation(before)
    logger.info("FlashAttention is not used: %s", fault)
    return False


def _is_flash(model: Any) -> bool:
    return str(model.config._attn_implementation).startswith("flash")


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _alone(model: Any, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids], device=input_device(model))
    logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return logits.float()


def _packed(model: Any, probe: Sequence[list[int]], rows: list[list[int]], pad_id: int) -> list[Tensor]:
    """Logits of each example, (tokens, vocabulary)."""
    block, owner = pack([Encoded(ids, ids, False, False) for ids in probe], rows, pad_id)
    del block["labels"]
    device = input_device(model)
    logits = model(**{name: tensor.to(device) for name, tensor in block.items()}, use_cache=False).logits
    return [logits[owner.to(logits.device) == index].float() for index in range(len(probe))]


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
