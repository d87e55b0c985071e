"""Identity of a base: its model type, its sizes, and sampled entries of its value matrices.

The positions of the samples depend only on the shape of a layer's W_V, so a base has the same samples, up to rounding,
in every dtype, quantisation, sharding and file format. Imports no torch at the top, because file formats use `Sizes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from braces_cli.core.errors import ModelError, logger
from braces_cli.core.schema import Count, Size

if TYPE_CHECKING:
    from torch import Tensor


SAMPLES = 64
# Four bits per weight give correlations above 0.98; unrelated samples stay below 0.6.
_CORRELATION = 0.9
_SLOPE = 0.1
# A larger difference is a fine-tuned or quantised copy, not rounding.
_NOTED = 0.02
# 2**64 divided by the golden ratio: its multiples are spread evenly over 2**64, and over the entries of any matrix.
_GOLDEN = 0x9E3779B97F4A7C15


class Sizes(TypedDict):
    """Type and sizes of a base."""

    model_type: str
    layers: Count
    hidden_size: Size
    value_vectors: list[Count]


def sampled_entries(parts: Sequence[Any]) -> Tensor:
    """Sampled entries of a layer's W_V, (64,) in float32 on the CPU; (0,) on the meta device.

    Args:
        parts: FFN of the layer, or its experts, whose value vectors are the columns of one matrix.
    """
    import torch

    from braces_cli.core.models.weights import dense

    width = sum(part.value_vectors for part in parts)
    entries = parts[0].hidden_size * width
    places = [divmod((k * _GOLDEN % 2**64) * entries >> 64, width) for k in range(SAMPLES)]
    rows, columns = torch.tensor(places).T
    samples, start = torch.zeros(SAMPLES), 0
    for part in parts:
        inside = (columns >= start) & (columns < start + part.value_vectors)
        if inside.any():
            stored = part.values()
            if stored.device.type == "meta":
                return torch.zeros(0)
            values = dense(stored).detach()
            values = values if values.ndim == 3 else values.unsqueeze(0)
            local = columns[inside] - start
            expert, column = local // values.shape[2], local % values.shape[2]
            samples[inside] = values[expert, rows[inside], column].float().cpu()
        start += part.value_vectors
    return samples


def check_same_base(
    what: str, sizes: Sizes, samples: Mapping[int, Tensor], base: Any, where: str, hint: str = ""
) -> None:
    """Compare a base with the sizes and samples in a file; notes a difference that is more than rounding.

    Args:
        what: start of the message, such as "this adapter was trained on".
        samples: by decoder layer; empty: only sizes are compared, as for a base on the meta device.

    Raises:
        ModelError: another base, unless `base.allow_other` is set and its hidden size is the same.
    """
    here = base.sizes
    problems = [
        f"{key.replace('_', ' ')} {_short(size)}, here {_short(here[key])}"
        for key, size in sizes.items()
        if size != here[key]
    ]
    found = {ffn.layer: ffn.samples for ffn in base.ffns if ffn.layer in samples}
    if not problems and any(each.numel() for each in found.values()):
        problems, difference = _compare(samples, found)
        if not problems and difference > _NOTED and not base.is_quantised:
            logger.warning("%s: the value matrices of this base differ by %.1f %%", where, 100 * difference)
    if not problems:
        return
    message = f"{what} another base ({'; '.join(problems)})"
    if sizes["hidden_size"] != here["hidden_size"]:
        raise ModelError(message, where=where, hint=hint)
    if not base.allow_other:
        raise ModelError(message, where=where, hint=f"{hint} --allow-other-base uses it on this base.".lstrip())
    logger.warning("%s: %s", where, message)


def _compare(samples: Mapping[int, Tensor], found: Mapping[int, Tensor]) -> tuple[list[str], float]:
    """Words about the first layer that differs, and rms of all differences over rms of all samples."""
    import torch

    stored, here = (torch.stack([part[layer] for layer in found]).double() for part in (samples, found))
    product, size, other = (stored * here).sum(1), stored.square().sum(1), here.square().sum(1)
    correlation, slope = (product / (size * other).sqrt()).nan_to_num(), (product / size).nan_to_num()
    same = (correlation >= _CORRELATION) & ((slope - 1).abs() <= _SLOPE) | (size + other == 0)
    words = [
        f"other value matrices: correlation {c:.2f}, slope {s:.2f} in layer {layer}"
        for layer, c, s, fits in zip(found, correlation.tolist(), slope.tolist(), same.tolist(), strict=True)
        if not fits
    ]
    return words[:1], float((here - stored).norm() / stored.norm())


def _short(value: object) -> object:
    """Return a list of equal sizes as that size."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value
