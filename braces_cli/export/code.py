"""A checkpoint with a small modelling file, for every architecture that can be adapted.

The base's tensors are unchanged. `modeling_braces.py`, from a template, adds the side path to transformers' classes.
"""

import inspect
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import write_json, write_tensors, write_text
from braces_cli.core.models.ffn import FFN, Experts, MixtureFFN
from braces_cli.core.models.structure import SIDE_PATH
from braces_cli.core.progress import Report, silent
from braces_cli.core.render import render
from braces_cli.core.schema import WRITTEN, Kind, Name, read
from braces_cli.export.checkpoint import steering_vectors
from braces_cli.export.run import Opened, Request, copy_companions, run
from braces_cli.export.verify import verify_export

CODE_FILE = "modeling_braces.py"
_SIDE_FILE = "model-braces.safetensors"
_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
# New name of a single file of base weights: loaders read an index only without a `model.safetensors`.
_RENAMED = "model-base.safetensors"
# Classes of the template for experts; a feed-forward module needs one line.
_MIXINS = {"experts": "ExpertsSidePath", "sorted": "SortedExpertsSidePath"}


@dataclass(frozen=True)
class SideModule:
    """The side path of one module.

    Attributes:
        path: of the module in the model.
        kind: `mlp` for a feed-forward module, `ends` for two projections of a decoder layer, `experts` for experts in
            one weight, `sorted` for experts that are called with their tokens only.
        stock: class of the module.
        mixed: the module is part of a mixture of experts.
        entry: settings of the module in the written config.
        rank: d_r.
        to_output: the side path reads the output of the FFN.
        tensors: by name in the model: A (d_r, d) with the shift of experts, and B (d, d_r) with the constant; B of all
            experts is concatenated, (d, experts * d_r).
    """

    path: str
    kind: str
    stock: type
    mixed: bool
    entry: dict[str, Any]
    rank: int
    to_output: bool
    tensors: dict[str, Tensor]


def side_modules(adapter: Adapter, vectors: Mapping[int, Tensor] | None = None) -> list[SideModule]:
    """The side paths of an adapter, with its current steering.

    Args:
        vectors: steering vector of each decoder layer, (d,).

    Raises:
        ConfigError: a layer with a steering vector has no side path, or is a mixture of experts.
        ModelError: relevance to the output of experts in one weight.
    """
    names = {module: name for name, module in adapter.model.named_modules()}
    vectors = vectors or {}
    other = sorted(vectors.keys() - {ffn.layer for ffn, _ in adapter.adapted_ffns if isinstance(ffn, FFN)})
    if other:
        what = f"layer {other[0]} is steered, and has no adapter layer or is a mixture of experts"
        hint = "Choose layers with --layers, or build the attribute with attr-build --reduction mean."
        raise ConfigError(what, where="--attribute", hint=hint)
    sides, to_output = [], adapter.relevance_to == "output"
    for ffn, adapter_layer in adapter.adapted_ffns:
        for part in ffn.parts:
            with torch.no_grad():
                reads, writes = (factor.cpu() for factor in adapter_layer.factors(part.values(), torch.float32))
            # Added to A h of experts, because the router weights it.
            shift = None if adapter_layer.shift is None else adapter_layer.shift.detach().float().cpu()
            constant = vectors.get(ffn.layer)  # added to the output for every token
            entry: dict[str, Any] = {"width": writes.shape[-2]}
            if isinstance(part, Experts):
                if to_output:
                    what = f"layer {ffn.layer} has experts in one weight, whose outputs a side path cannot read"
                    raise ModelError(what, hint="Merge the adapter (braces merge), or serve it with braces steer.")
                module, kind = part.module, "sorted" if part.presorted else "experts"
                entry["experts"] = len(writes)
            elif part.is_host_output:
                module, kind = part.host, "mlp"
            else:
                module, kind = part.host, "ends"
                entry["ends"] = [names[part.keys[0]], names[part.value]]
            if writes.ndim == 3:
                # (experts, d, d_r) -> (d, experts * d_r)
                writes = writes.transpose(0, 1).flatten(1)
            elif shift is not None:
                through, shift = writes @ shift, None
                constant = through if constant is None else through + constant
            entry |= {"shift": shift is not None, "constant": constant is not None}
            first, last = (f"{names[module]}.{name}" for name in SIDE_PATH)
            tensors = {f"{first}.weight": reads, f"{last}.weight": writes}
            tensors |= {} if shift is None else {f"{first}.bias": shift}
            tensors |= {} if constant is None else {f"{last}.bias": constant}
            mixed = isinstance(ffn, MixtureFFN)
            sides.append(SideModule(names[module], kind, type(module), mixed, entry, len(reads), to_output, tensors))
    return sides


def export_code(request: Request, report: Report = silent) -> dict[str, Any]:
    """Write base and adapter as a checkpoint with a modelling file; see `export.run.run`."""

    def write(opened: Opened, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        session = opened.session
        assert session.adapter is not None
        assert session.base.checkpoint is not None
        copy_companions(session, folder)
        with steered(session, opened.terms, opened.layers) as steering:
            sides = side_modules(session.adapter, steering_vectors(steering))
        session.remove_adapter()
        facts = write_checkpoint_with_code(folder, session.base.model, sides, session.base.checkpoint)
        return {**facts, "rank": sides[0].rank}, {}

    return run("code", request, write, partial(verify_export, code=True), report)


def write_checkpoint_with_code(folder: Path, model: Any, sides: list[SideModule], checkpoint: Path) -> dict[str, Any]:
    """Write weights, config and modelling file of a base, without an adapter attached, and its side paths.

    Args:
        checkpoint: folder with the base's files.

    Raises:
        ModelError: the base has modelling code in its folder.
    """
    if getattr(model.config, "auto_map", None):
        hint = "Serve it with braces steer --adapter."
        raise ModelError(f"{type(model).__name__} brings its own code, which cannot be extended", hint=hint)
    tensors = {name: tensor.to(model.dtype) for side in sides for name, tensor in side.tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files = _link_weights(checkpoint, folder, model)
    write_tensors(folder / _SIDE_FILE, tensors)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    files |= dict.fromkeys(tensors, _SIDE_FILE)
    write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})
    # vLLM replaces projections that stand alone, and experts, by its modules.
    served = all(side.kind == "mlp" and not side.mixed for side in sides)
    code, classes = _modelling_code(model, sides, served)
    write_text(folder / CODE_FILE, code)
    model.config.save_pretrained(folder)
    config = read(WRITTEN, folder / "config.json") | {
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{Path(CODE_FILE).stem}.{name}" for auto, name in classes.items()},
        "braces": {"rank": sides[0].rank, "modules": {side.path: side.entry for side in sides}},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    return {
        "architecture": classes["AutoModelForCausalLM"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "served": served,
    }


class WeightIndex(TypedDict):
    """`model.safetensors.index.json`: the file of each tensor."""

    weight_map: dict[Name, Annotated[str, Meta(pattern=r"^[^/\\\x00]+\.safetensors\Z")]]


_WEIGHT_INDEX = Kind(WeightIndex, ModelError, "Check that the base's download is complete.")


def _link_weights(checkpoint: Path, folder: Path, model: Any) -> dict[str, str]:
    """Link the base's weight files into `folder`, or copy them; returns the file of each tensor.

    A base without safetensors files, or whose weights were unpacked while it was loaded (FP8 and MXFP4 without a GPU),
    is saved again.
    """
    from safetensors import safe_open

    index, one, config = (checkpoint / name for name in (_INDEX, _ONE_FILE, "config.json"))
    is_packed = config.is_file() and read(WRITTEN, config).get("quantization_config") is not None
    is_unpacked = is_packed and getattr(model.config, "quantization_config", None) is None
    if is_unpacked or not (index.is_file() or one.is_file()):
        temporary = folder / "weights"
        model.save_pretrained(temporary)
        files = _link_weights(temporary, folder, model)
        shutil.rmtree(temporary)
        return files
    if index.is_file():
        files = read(_WEIGHT_INDEX, index)["weight_map"]
        names = {name: name for name in files.values()}
    else:
        with safe_open(one, framework="pt") as file:
            files = dict.fromkeys(file.keys(), _RENAMED)
        names = {_ONE_FILE: _RENAMED}
    for source, name in names.items():
        target = (checkpoint / source).resolve()
        try:
            os.link(target, folder / name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(target, folder / name)
    return files


def _modelling_code(model: Any, sides: list[SideModule], served: bool) -> tuple[str, dict[str, str]]:
    """The modelling file, and its classes that the config names for transformers' Auto classes."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    architecture, base = type(model), model.base_model
    # The Auto class of the model without its head, if the config is that of this model.
    has_base = base is not model and type(base.config) is type(model.config)
    stock = {side.stock: side.kind for side in sides if side.kind != "ends"}
    autos: dict[str, type] = ({"AutoModel": type(base)} if has_base else {}) | {"AutoModelForCausalLM": architecture}
    names = {auto: f"Braces{kind.__name__}" for auto, kind in autos.items()}
    imports: dict[str, list[str]] = {}
    for needed in dict.fromkeys((*autos.values(), *stock)):
        imports.setdefault(needed.__module__, []).append(needed.__name__)
    pairs = [(kind.__name__, names[auto]) for auto, kind in reversed(autos.items())]
    renamed = [(old, new) for old, new in pairs if get_checkpoint_conversion_mapping(old) is not None]
    if renamed:
        functions = ["get_checkpoint_conversion_mapping", "register_checkpoint_conversion_mapping"]
        imports["transformers.conversion_mapping"] = functions
    classes = []
    for module_class, kind in stock.items():
        # The input keeps its name, by which it may be passed.
        first, *others = list(inspect.signature(module_class.forward).parameters)[1:]  # type: ignore[attr-defined]
        classes.append(
            {
                "name": f"Braces{module_class.__name__}",
                "stock": module_class.__name__,
                "mixin": _MIXINS.get(kind),
                "input": first,
                "arguments": ", ".join([first, *(("*args", "**kwargs") if others else ())]),
            }
        )
    data = {
        "renamed": renamed,
        "served": served,
        "to_output": sides[0].to_output,
        "architecture": architecture.__name__,
        "imports": [(module, sorted(found)) for module, found in sorted(imports.items())],
        "kinds": sorted({side.kind for side in sides}),
        "classes": classes,
        "causal": names["AutoModelForCausalLM"],
        "base_name": names.get("AutoModel"),
        "base_stock": type(base).__name__ if has_base else None,
    }
    return render("export/modeling.py.j2", data), names
