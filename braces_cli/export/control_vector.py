"""Steering as a GGUF control vector, `direction.{layer}`, as repeng and llama.cpp read it.

Both add such a vector to the output of a decoder layer, braces to the output of its FFN. The two are equal if the FFN
joins the residual stream unchanged or times a constant, which is measured and multiplied in. The side path of an
adapter is not a constant and not exported: the vector equals the steering on top of the merged model only.

The format has no layer 0. Its vector is left out, and the others are scaled to the same total: the sum over layers of
the norm relative to that of the residual stream.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import layer_steering
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError, ModelError, logger
from braces_cli.core.files import check_output_file, output_lock
from braces_cli.core.models.ffn import MixtureFFN, layer_stack
from braces_cli.core.models.residual import residual_factors
from braces_cli.export.lora import write_gguf_tensors
from braces_cli.export.run import Request, open_request, probe_tokens
from braces_cli.export.verify import check_vectors

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
    """Write the vectors of attributes at their strengths; returns `{path, layers, hidden_size, left_out, scaled_by}`.

    The result also has the difference of logits, see `check_vectors`.

    Raises:
        ConfigError: nothing is steered, or layer 0 only.
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
    steering = layer_steering(session, terms, layers)
    if not steering:
        hint = "Give an --attribute and an --s other than 0."
        raise ConfigError("nothing is steered", where="--attribute", hint=hint)
    kept = [each for each in steering if each.layer > 0]
    if not kept:
        hint = "Add --layers 1-; llama.cpp refuses vectors for layer 0."
        raise ConfigError("a control vector cannot steer layer 0", where="--layers", hint=hint)
    ratio = sum(each.share for each in steering) / sum(each.share for each in kept)
    if len(kept) < len(steering):
        logger.warning("layer 0 is left out, and the vectors of the other layers are multiplied by %.4g", ratio)
    stack, ffns = layer_stack(model)[1], [each.ffn for each in kept]
    vectors = {each.layer: ratio * each.total[0] for each in kept}
    tensors, exported = {}, []
    for ffn, factor in zip(ffns, residual_factors(model, ffns, probe_tokens(session)), strict=True):
        if factor is None:
            reason = f"layer {ffn.layer} does not add the output of its FFN to the residual stream unchanged"
            hint = "Steer with braces itself, or merge the attribute: braces merge --attribute."
            raise _refused(model, reason, hint)
        tensors[f"direction.{ffn.layer}"] = factor * vectors[ffn.layer]
        exported.append((stack[ffn.layer], factor * vectors[ffn.layer]))
    checked = check_vectors(session, [(ffn.output_module, vectors[ffn.layer]) for ffn in ffns], exported)

    def add_header(writer: Any) -> None:
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model.config.model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(tensors))

    write_gguf_tensors(path, _ARCHITECTURE, tensors, add_header)
    facts = {"path": str(path), "layers": sorted(vectors), "hidden_size": ffns[0].hidden_size}
    left_out = [each.layer for each in steering if each.layer == 0]
    return facts | {"left_out": left_out, "scaled_by": ratio} | checked


def _refused(model: Any, reason: str, hint: str) -> ModelError:
    return ModelError(f"no control vector steers {type(model).__name__} as braces does: {reason}", hint=hint)
