"""Export steering as a GGUF control vector, `direction.{layer}`, as repeng and llama.cpp read it.

Both add such a vector to what leaves a decoder layer, braces to what leaves its FFN. The two are the same where the FFN
joins the residual stream as it is, or times a constant, which is measured and folded in. The side path of an adapter
is no constant and stays behind: the export equals adapter and attribute on top of the merged model only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import constants
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import check_output_file
from braces_cli.core.models.ffn import FFN, MixtureFFN, residual_factors
from braces_cli.core.models.load import input_device
from braces_cli.core.models.options import format_ranges
from braces_cli.core.models.tokenize import encode
from braces_cli.export.checkpoint import write_gguf_tensors

_ARCHITECTURE = "controlvector"


def check_export(path: Path, overwrite: bool = False) -> None:
    """See that an export to `path` can be written, before minutes of loading.

    Raises:
        ConfigError: the file is there already and `overwrite` is off, or the package gguf is not there.
    """
    if find_spec("gguf") is None:
        hint = "Install it with: pip install gguf"
        raise ConfigError("the export needs the package gguf", where="braces export control-vector", hint=hint)
    check_output_file(path, overwrite)


def export_control_vector(
    session: Session, terms: Sequence[tuple[Attribute, float]], layers: Collection[int] | None, path: Path
) -> dict[str, Any]:
    """Write the vectors of attributes at their strengths; returns `{path, layers, hidden_size}`.

    Raises:
        ConfigError: nothing is steered, or layer 0 is, which llama.cpp does not read.
        ModelError: the output of an FFN does not join the residual stream unchanged or times a constant, or an
            attribute goes through an adapter's experts, so no vector does the same.
    """
    _check_experts(session, terms, layers)
    vectors = constants(session, terms, layers)
    if not vectors:
        raise ConfigError(
            "nothing is steered", where="--attribute", hint="Give an --attribute and an --s other than 0."
        )
    if 0 in vectors:
        # The other steered layers by number: `1-` would push more layers than are pushed without it.
        others = format_ranges(vectors.keys() - {0}) or "1-"
        hint = f"Add --layers {others}; llama.cpp refuses vectors for layer 0."
        raise ConfigError("a control vector cannot steer layer 0", where="--layers", hint=hint)
    factors = _factors(session, [ffn for ffn in session.ffns if ffn.layer in vectors])
    directions = {layer: factors[layer] * vector for layer, vector in vectors.items()}
    model_type = session.base.model.config.model_type

    def describe(writer: Any) -> None:
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))

    tensors = {f"direction.{layer}": vector for layer, vector in sorted(directions.items())}
    write_gguf_tensors(path, _ARCHITECTURE, tensors, describe)
    return {"path": str(path), "layers": sorted(directions), "hidden_size": len(next(iter(directions.values())))}


def _check_experts(session: Session, terms: Sequence[tuple[Attribute, float]], layers: Collection[int] | None) -> None:
    """Refuse an attribute that goes through an adapter on experts; a push stands behind the whole mixture."""
    through = any(attribute.direction is None and s != 0 for attribute, s in terms)
    for ffn, _ in session.adapter.adapted_ffns if session.adapter is not None and through else []:
        if isinstance(ffn, MixtureFFN) and (layers is None or ffn.layer in layers):
            reason = f"what the adapter adds in layer {ffn.layer} depends on the router"
            hint = "Steer with braces itself, or with a steering vector (attr-build without --reduction mean)."
            raise _no_vector(session, reason, hint)


def _factors(session: Session, ffns: Sequence[FFN | MixtureFFN]) -> dict[int, float]:
    """What each layer multiplies the output of its FFN by before it joins the residual stream.

    Raises:
        ModelError: a layer does something else with it, such as normalise it.
    """
    model = session.base.model
    ids = torch.tensor([encode(session.base.tokenizer, "The town has a library.").ids], device=input_device(model))
    factors: dict[int, float] = {}
    for ffn, factor in zip(ffns, residual_factors(model, ffns, ids), strict=True):
        if factor is None:
            raise _no_vector(
                session, f"layer {ffn.layer} does not add the output of its FFN to the residual stream unchanged"
            )
        factors[ffn.layer] = factor
    return factors


def _no_vector(
    session: Session,
    reason: str,
    hint: str = "Steer with braces itself, or merge the attribute: braces merge --attribute.",
) -> ModelError:
    name = type(session.base.model).__name__
    return ModelError(f"no control vector steers {name} as braces does: {reason}", hint=hint)
