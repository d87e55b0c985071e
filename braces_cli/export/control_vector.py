"""Steering as a GGUF control vector, `direction.{layer}`, as repeng and llama.cpp read it.

Both add such a vector to the output of a decoder layer, braces to the output of its FFN. The two are equal if the FFN
joins the residual stream unchanged or times a constant, which is measured and multiplied in. The side path of an
adapter is not a constant and not exported: the vector equals the steering on top of the merged model only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import layer_steering
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.config import format_ranges
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import check_output_file, output_lock
from braces_cli.core.models.ffn import MixtureFFN
from braces_cli.core.models.residual import residual_factors
from braces_cli.export.lora import write_gguf_tensors
from braces_cli.export.run import Request, open_request, probe_tokens

_ARCHITECTURE = "controlvector"


def write_control_vector(request: Request) -> dict[str, Any]:
    """Write the request's attributes at their strengths; returns what the command prints.

    Raises:
        ConfigError: the file exists, or see `export_control_vector`.
        ModelError: base and adapter do not fit, or see `export_control_vector`.
    """
    with output_lock(request.output):
        check_output_file(request.output, request.overwrite)
        opened = open_request(request, in_memory=False)
        found = export_control_vector(opened.session, opened.terms, opened.layers, request.output)
    return {**found, "attributes": request.attributes}


def export_control_vector(
    session: Session, terms: Sequence[tuple[Attribute, float]], layers: Collection[int] | None, path: Path
) -> dict[str, Any]:
    """Write the vectors of attributes at their strengths; returns `{path, layers, hidden_size}`.

    Raises:
        ConfigError: nothing is steered, or layer 0 is, which llama.cpp does not read.
        ModelError: the output of an FFN does not join the residual stream unchanged or times a constant, or an
            attribute goes through an adapter's experts.
    """
    model = session.base.model
    through = any(attribute.direction is None and s != 0 for attribute, s in terms)
    for ffn, _ in session.adapter.adapted_ffns if session.adapter is not None and through else []:
        if isinstance(ffn, MixtureFFN) and (layers is None or ffn.layer in layers):
            reason = f"the adapter's output in layer {ffn.layer} depends on the router"
            hint = "Steer with braces itself, or with a steering vector (attr-build without --reduction mean)."
            raise _refused(model, reason, hint)
    vectors = {each.layer: each.total[0] for each in layer_steering(session, terms, layers)}
    if not vectors:
        hint = "Give an --attribute and an --s other than 0."
        raise ConfigError("nothing is steered", where="--attribute", hint=hint)
    if 0 in vectors:
        # The other layers by number: `1-` would steer more layers than those of the steering vector.
        others = format_ranges(vectors.keys() - {0}) or "1-"
        hint = f"Add --layers {others}; llama.cpp refuses vectors for layer 0."
        raise ConfigError("a control vector cannot steer layer 0", where="--layers", hint=hint)
    ffns = [ffn for ffn in session.ffns if ffn.layer in vectors]
    tensors = {}
    for ffn, factor in zip(ffns, residual_factors(model, ffns, probe_tokens(session)), strict=True):
        if factor is None:
            reason = f"layer {ffn.layer} does not add the output of its FFN to the residual stream unchanged"
            hint = "Steer with braces itself, or merge the attribute: braces merge --attribute."
            raise _refused(model, reason, hint)
        tensors[f"direction.{ffn.layer}"] = factor * vectors[ffn.layer]

    def add_header(writer: Any) -> None:
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model.config.model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(tensors))

    write_gguf_tensors(path, _ARCHITECTURE, tensors, add_header)
    return {"path": str(path), "layers": sorted(vectors), "hidden_size": ffns[0].hidden_size}


def _refused(model: Any, reason: str, hint: str) -> ModelError:
    return ModelError(f"no control vector steers {type(model).__name__} as braces does: {reason}", hint=hint)
