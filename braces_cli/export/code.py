"""A checkpoint with a small modelling file, for every architecture that can be adapted.

The base's tensors are unchanged. `modeling_braces.py`, from a template, adds the side path to transformers' classes.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
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
from braces_cli.core.progress import Report
from braces_cli.core.render import render
from braces_cli.core.schema import WRITTEN, Kind, Name, read
from braces_cli.export.run import Export, Opened, copy_companions

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
        ends: names of the first and the last projection; `ends` only.
        experts: their number; 1 for `mlp` and `ends`.
        mixed: the module is part of a mixture of experts.
        reads: A (d_r, d).
        writes: B of all experts, concatenated (d, experts * d_r).
        shift: of experts, added to A h by steering through the adapter (d_r,), because the router weights it; or None.
        constant: added to the output for every token (d,), or None.
    """

    path: str
    kind: str
    stock: type
    ends: tuple[str, ...]
    experts: int
    mixed: bool
    reads: Tensor
    writes: Tensor
    shift: Tensor | None
    constant: Tensor | None

    @property
    def entry(self) -> dict[str, Any]:
        """Settings of the module in the written config."""
        entry = {"width": len(self.writes), "shift": self.shift is not None, "constant": self.constant is not None}
        if self.kind in _MIXINS:
            entry["experts"] = self.experts
        return entry | ({"ends": list(self.ends)} if self.ends else {})


def side_modules(adapter: Adapter, vectors: Mapping[int, Tensor] | None = None) -> list[SideModule]:
    """The side paths of an adapter, with its current steering.

    Args:
        vectors: steering vector of each decoder layer, (d,).

    Raises:
        ConfigError: a layer with a steering vector has no side path, or is a mixture of experts.
    """
    names = {module: name for name, module in adapter.model.named_modules()}
    vectors = vectors or {}
    other = sorted(vectors.keys() - {ffn.layer for ffn, _ in adapter.adapted_ffns if isinstance(ffn, FFN)})
    if other:
        what = f"layer {other[0]} is steered, and has no adapter layer or is a mixture of experts"
        hint = "Choose layers with --layers, or build the attribute with attr-build --reduction mean."
        raise ConfigError(what, where="--attribute", hint=hint)
    sides = []
    for ffn, adapter_layer in adapter.adapted_ffns:
        for part in ffn.parts:
            with torch.no_grad():
                reads, writes = (factor.cpu() for factor in adapter_layer.factors(part.values(), torch.float32))
            shift = None if adapter_layer.shift is None else adapter_layer.shift.detach().float().cpu()
            constant, experts = vectors.get(ffn.layer), 1
            ends: tuple[str, ...] = ()
            if isinstance(part, Experts):
                module, kind = part.module, "sorted" if part.presorted else "experts"
            elif part.is_host_output:
                module, kind = part.host, "mlp"
            else:
                module, kind, ends = part.host, "ends", (names[part.keys[0]], names[part.value])
            if writes.ndim == 3:
                # (experts, d, d_r) -> (d, experts * d_r)
                experts, writes = len(writes), writes.transpose(0, 1).flatten(1)
            if shift is not None and experts == 1:
                through, shift = writes @ shift, None
                constant = through if constant is None else through + constant
            mixed = isinstance(ffn, MixtureFFN)
            side = SideModule(names[module], kind, type(module), ends, experts, mixed, reads, writes, shift, constant)
            sides.append(side)
    return sides


@dataclass(frozen=True)
class CodeExport(Export):
    """Base and adapter as a checkpoint with a modelling file."""

    name = "code"
    has_code = True

    def write(self, opened: Opened, folder: Path, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
        session = opened.session
        assert session.adapter is not None
        assert session.base.checkpoint is not None
        with steered(session, opened.terms, opened.layers) as steering:
            vectors = {each.layer: each.vector for each in steering if each.vector is not None}
            sides = side_modules(session.adapter, vectors)
        session.remove_adapter()
        facts = write_checkpoint_with_code(folder, session.base.model, sides, session.base.checkpoint)
        copy_companions(session, folder)
        return {**facts, "rank": len(sides[0].reads)}, {}


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
    tensors = side_tensors(sides, model.dtype)
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
        "braces": {"rank": len(sides[0].reads), "modules": {side.path: side.entry for side in sides}},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    return {
        "architecture": classes["AutoModelForCausalLM"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "served": served,
    }


def side_tensors(sides: list[SideModule], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the side paths by name."""
    tensors = {}
    for side in sides:
        reads, writes = (f"{side.path}.{name}" for name in SIDE_PATH)
        tensors[f"{reads}.weight"] = side.reads.to(dtype)
        tensors[f"{writes}.weight"] = side.writes.to(dtype)
        if side.shift is not None:
            tensors[f"{reads}.bias"] = side.shift.to(dtype)
        if side.constant is not None:
            tensors[f"{writes}.bias"] = side.constant.to(dtype)
    return tensors


class WeightIndex(TypedDict):
    """`model.safetensors.index.json`: the file of each tensor."""

    weight_map: dict[Name, Annotated[str, Meta(pattern=r"^[^/\\\x00]+\.safetensors\Z")]]


_WEIGHT_INDEX = Kind(WeightIndex, ModelError, "Check that the base's download is complete.")


def _link_weights(checkpoint: Path, folder: Path, model: Any) -> dict[str, str]:
    """Link the base's weight files into `folder`, or copy them; returns the file of each tensor.

    A base without safetensors files is saved again.
    """
    from safetensors import safe_open

    index = checkpoint / _INDEX
    if index.is_file():
        files = read(_WEIGHT_INDEX, index)["weight_map"]
        names = {name: name for name in files.values()}
    elif (checkpoint / _ONE_FILE).is_file():
        with safe_open(checkpoint / _ONE_FILE, framework="pt") as file:
            files = dict.fromkeys(file.keys(), _RENAMED)
        names = {_ONE_FILE: _RENAMED}
    else:
        temporary = folder / "weights"
        model.save_pretrained(temporary)
        files = _link_weights(temporary, folder, model)
        shutil.rmtree(temporary)
        return files
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
    imports: dict[str, list[str]] = {}
    for kind in dict.fromkeys((architecture, *((type(base),) if has_base else ()), *stock)):
        imports.setdefault(kind.__module__, []).append(kind.__name__)
    names = {"AutoModelForCausalLM": f"Braces{architecture.__name__}"}
    pairs = [(architecture.__name__, names["AutoModelForCausalLM"])]
    if has_base:
        names = {"AutoModel": f"Braces{type(base).__name__}", **names}
        pairs.append((type(base).__name__, names["AutoModel"]))
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
        "architecture": architecture.__name__,
        "imports": [(module, sorted(found)) for module, found in sorted(imports.items())],
        "kinds": sorted({side.kind for side in sides}),
        "classes": classes,
        "causal": names["AutoModelForCausalLM"],
        "base_name": names.get("AutoModel"),
        "base_stock": type(base).__name__ if has_base else None,
    }
    return render("export/modeling.py.j2", data), names
