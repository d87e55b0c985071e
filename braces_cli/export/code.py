"""Write base and adapter as a checkpoint with a modelling file, for bases that no plain checkpoint can hold.

The base's files are linked, or copied where they cannot be; beside them lie the tensors of the side path and a
`modeling_braces.py`, made from a template, that adds it to the stock classes. What it imports is transformers.
"""

from __future__ import annotations

import gc
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
from braces_cli.core.attributes.hooks import steered, steering_vectors
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.files import file_hint, write_json, write_tensors, write_text
from braces_cli.core.models.ffn import FFN, Experts, MixtureFFN
from braces_cli.core.models.structure import SIDE_PATH
from braces_cli.core.progress import Report, silent
from braces_cli.core.render import render
from braces_cli.core.schema import WRITTEN, Kind, Name, read
from braces_cli.core.versions import versions
from braces_cli.export.cards import code_card
from braces_cli.export.checkpoint import check_output, copy_companions, new_folder
from braces_cli.export.request import Request, inputs, open_bare, sources, steering
from braces_cli.export.verify import Loading, Reference, figures, reference, verify_export

RECORD_FILE = "braces_code.json"
FORMAT_VERSION = 1
CODE_FILE = "modeling_braces.py"
SIDE_FILE = "model-braces.safetensors"
_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
# Where the base's weights are one file, it gets another name: loaders look for an index only where there is none.
_RENAMED = "model-base.safetensors"
# Classes in the template that experts get; a feed-forward module needs one line alone.
_MIXINS = {"experts": "ExpertsSidePath", "sorted": "SortedExpertsSidePath"}


@dataclass(frozen=True)
class Side:
    """The side path of one module.

    Attributes:
        path: of the module that gets it, in the model.
        kind: `mlp` for a feed-forward module, `ends` where its two ends stand loose in a layer, `experts` for experts
            in one weight, `sorted` for those that are called with their own tokens.
        stock: class of the module.
        ends: names of the first projection that reads and of the one that writes; `ends` only.
        experts: how many; 1 for `mlp` and `ends`.
        mixed: the module is part of a mixture of experts.
        reads: A (d_r, d).
        writes: B of all experts side by side (d, experts * d_r).
        shift: what steering adds to A h (d_r,), None where nothing steers through the adapter.
        steering_vector: added to the output, (d,), or None.
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
    steering_vector: Tensor | None = None

    @property
    def constant(self) -> Tensor | None:
        """What is added to the output whatever the token, (d,): not of experts, which a router weighs."""
        if self.shift is None or self.experts > 1:
            return self.steering_vector
        through = self.writes @ self.shift
        return through if self.steering_vector is None else through + self.steering_vector


def side_paths(adapter: Adapter, steering: Mapping[int, Tensor] | None = None) -> list[Side]:
    """The side paths of an adapter, with the steering set on it just now.

    Args:
        steering: steering vector of each decoder layer, (d,).

    Raises:
        ConfigError: a layer with a steering vector has no side path, or one of a mixture of experts.
    """
    names = {module: name for name, module in adapter.model.named_modules()}
    steering = steering or {}
    plain = {ffn.layer for ffn, _ in adapter.adapted_ffns if isinstance(ffn, FFN)}
    if elsewhere := sorted(steering.keys() - plain):
        what = f"layer {elsewhere[0]} is steered, and has no adapter of its own or is a mixture of experts"
        hint = "Choose layers with --layers, or build the attribute with attr-build --reduction mean."
        raise ConfigError(what, where="--attribute", hint=hint)
    found = []
    for ffn, adapter_layer in adapter.adapted_ffns:
        for part in ffn.parts:
            with torch.no_grad():
                reads, writes = adapter_layer.factors(part.values(), torch.float32)
            shift = None if adapter_layer.shift is None else adapter_layer.shift.detach().float().cpu()
            kind = _kind(part)
            ends = (names[part.keys[0]], names[part.value]) if kind == "ends" else ()
            module = part.host if isinstance(part, FFN) else part.module
            # (experts, d, d_r) -> (d, experts * d_r)
            flat = writes if writes.ndim == 2 else writes.transpose(0, 1).flatten(1)
            count = 1 if writes.ndim == 2 else len(writes)
            steering_vector = steering.get(ffn.layer)
            mixed = isinstance(ffn, MixtureFFN)
            side = Side(
                names[module], kind, type(module), ends, count, mixed, reads.cpu(), flat.cpu(), shift, steering_vector
            )
            found.append(side)
    return found


def _kind(part: FFN | Experts) -> str:
    if isinstance(part, Experts):
        return "sorted" if part.sorted else "experts"
    return "mlp" if part.whole else "ends"


def write_code(request: Request, output: Path, overwrite: bool = False, report: Report = silent) -> dict[str, Any]:
    """Write the checkpoint with its modelling file, proved, into `output`; returns what the command prints.

    Raises:
        ConfigError: no adapter, or an output folder that is not empty, or is or lies in one of the inputs.
        ModelError: base and adapter do not fit, the base brings code of its own, or the proof fails.
        BracesError: the disk is full.
    """
    stored = request.stored
    check_output(output, overwrite, inputs(request))
    with new_folder(output, overwrite) as folder:
        facts, expected = _write(request, folder, report)
        # The base is gone from memory: the proof loads what was written in a process of its own.
        gc.collect()
        report("proving", 0, 1)
        proof = verify_export(folder, expected, Loading(code=True))
        report("proving", 1, 1)
        result = {**facts, **figures(proof), "rank": stored.config.r}
        write_json(folder / RECORD_FILE, {"format_version": FORMAT_VERSION, **result, "versions": versions()})
        write_text(folder / "README.md", code_card(result))
    return {"output_dir": str(output), **result}


def _write(request: Request, folder: Path, report: Report) -> tuple[dict[str, Any], Reference]:
    """Everything that needs the base in memory; it is let go of on return."""
    report("loading", 0, 1)
    session = open_bare(request)
    model = session.base.model
    terms, layers = steering(session, request)
    adapter = session.add_adapter(request.stored)
    report("loading", 1, 1)
    expected = reference(session, terms, layers)
    with steered(session, terms, layers):
        sides = side_paths(adapter, steering_vectors(session, terms, layers))
    adapter.detach()
    assert session.base.checkpoint is not None
    facts = write_checkpoint_with_code(folder, model, sides, session.base.checkpoint)
    copy_companions(session.base.checkpoint, folder, session.base.tokenizer)
    facts |= {"dtype": str(model.dtype).removeprefix("torch."), **sources(request)}
    return facts | {"model": session.base.name, "revision": session.base.revision}, expected


def write_checkpoint_with_code(folder: Path, model: Any, sides: list[Side], checkpoint: Path) -> dict[str, Any]:
    """Write weights, config and modelling file of a bare base and its side paths into `folder`.

    Args:
        checkpoint: folder with the base's files.

    Raises:
        ModelError: the base brings code of its own.
        BracesError: the disk is full.
    """
    if getattr(model.config, "auto_map", None):
        hint = "Serve it with braces steer --adapter."
        raise ModelError(f"{type(model).__name__} brings its own code, which cannot be extended", hint=hint)
    tensors = _tensors(sides, model.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    files = _link_weights(checkpoint, folder, model)
    write_tensors(folder / SIDE_FILE, tensors)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    files |= dict.fromkeys(tensors, SIDE_FILE)
    write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})
    code, classes = _code(model, sides)
    write_text(folder / CODE_FILE, code)
    _write_config(folder, model, sides, classes)
    return {
        "architecture": classes["AutoModelForCausalLM"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "served": _served(sides),
    }


def _served(sides: list[Side]) -> bool:
    """Whether all side paths stay where servers put their own projections and experts in place of the model's."""
    return all(side.kind == "mlp" and not side.mixed for side in sides)


def _tensors(sides: list[Side], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for side in sides:
        reads, writes = (f"{side.path}.{name}" for name in SIDE_PATH)
        tensors[f"{reads}.weight"] = side.reads.to(dtype)
        tensors[f"{writes}.weight"] = side.writes.to(dtype)
        # What a router weighs must be weighed with the rest; elsewhere the constant is added as it is.
        if side.experts > 1 and side.shift is not None:
            tensors[f"{reads}.bias"] = side.shift.to(dtype)
        if side.constant is not None:
            tensors[f"{writes}.bias"] = side.constant.to(dtype)
    return tensors


class WeightIndex(TypedDict):
    """`model.safetensors.index.json`: which tensor lies in which file."""

    weight_map: dict[Name, Annotated[str, Meta(pattern=r"^[^/\\\x00]+\.safetensors\Z")]]


_WEIGHT_INDEX = Kind(WeightIndex, ModelError, "Check that the base's download is complete.")


def _link_weights(checkpoint: Path, folder: Path, model: Any) -> dict[str, str]:
    """Link the base's weight files into `folder`, or copy them; returns which tensor lies in which file.

    A base without safetensors files is written anew.
    """
    from safetensors import safe_open

    index = checkpoint / _INDEX
    if index.is_file():
        files = read(_WEIGHT_INDEX, index)["weight_map"]
        names = {name: name for name in sorted(set(files.values()))}
        if any(Path(name).name != name for name in names):
            raise ModelError("it names files of other folders", where=str(index), hint="Get the model anew.")
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
    try:
        for source, name in names.items():
            _link((checkpoint / source).resolve(), folder / name)
    except OSError as error:
        raise BracesError(f"cannot write: {error.strerror}", where=str(folder), hint=file_hint(error)) from error
    return files


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _code(model: Any, sides: list[Side]) -> tuple[str, dict[str, str]]:
    """The modelling file, and the classes in it that the config names for transformers' Auto classes."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    architecture = type(model)
    base = model.base_model
    whole = base is model or type(base.config) is not type(model.config)
    stock = {side.stock: side.kind for side in sides if side.kind != "ends"}
    classes = [_subclass(kind, stock[kind]) for kind in stock]
    imports: dict[str, list[str]] = {}
    for kind in dict.fromkeys((architecture, *(() if whole else (type(base),)), *stock)):
        imports.setdefault(kind.__module__, []).append(kind.__name__)
    names = {"AutoModelForCausalLM": f"Braces{architecture.__name__}"}
    if not whole:
        names = {"AutoModel": f"Braces{type(base).__name__}", **names}
    pairs = [(architecture.__name__, names["AutoModelForCausalLM"]), (type(base).__name__, names.get("AutoModel"))]
    renamed = [(old, new) for old, new in pairs if new and get_checkpoint_conversion_mapping(old) is not None]
    if renamed:
        functions = ["get_checkpoint_conversion_mapping", "register_checkpoint_conversion_mapping"]
        imports["transformers.conversion_mapping"] = functions
    data = {
        "renamed": renamed,
        "served": _served(sides),
        "architecture": architecture.__name__,
        "imports": [(module, sorted(found)) for module, found in sorted(imports.items())],
        "kinds": sorted({side.kind for side in sides}),
        "classes": classes,
        "causal": names["AutoModelForCausalLM"],
        "base_name": names.get("AutoModel"),
        "base_stock": None if whole else type(base).__name__,
    }
    return render("export/modeling.py.j2", data), names


def _subclass(stock: type, kind: str) -> dict[str, Any]:
    """What the template needs to subclass a module's class; its input keeps its name, by which it may be called."""
    first, *others = list(inspect.signature(stock.forward).parameters)[1:]  # type: ignore[attr-defined]
    return {
        "name": f"Braces{stock.__name__}",
        "stock": stock.__name__,
        "mixin": _MIXINS.get(kind),
        "input": first,
        "arguments": ", ".join([first, *(("*args", "**kwargs") if others else ())]),
    }


def _write_config(folder: Path, model: Any, sides: list[Side], classes: dict[str, str]) -> None:
    model.config.save_pretrained(folder)
    config = read(WRITTEN, folder / "config.json")
    entries = {}
    for side in sides:
        entry: dict[str, Any] = {"width": len(side.writes)}
        entry["shift"] = side.shift is not None and side.experts > 1
        entry["constant"] = side.constant is not None
        if side.kind in ("experts", "sorted"):
            entry["experts"] = side.experts
        if side.ends:
            entry["ends"] = list(side.ends)
        entries[side.path] = entry
    config |= {
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{Path(CODE_FILE).stem}.{name}" for auto, name in classes.items()},
        "braces": {"rank": len(sides[0].reads), "modules": entries},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
