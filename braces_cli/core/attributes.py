"""Attributes: words -> pooled FFN inputs of a base -> the hidden state h_c that steers, at every layer.

    p   = pooled(attribute) - pooled(reference)         reference: neutral words, stored beside every attribute
    h_c = p                                             (plus a trained MLP of p where attributes were trained)
    pooled(words) = mean over words of the mean over each word's tokens of h, the input of the FFN

The reference is there because pooled states of any words share most of their direction. `p` depends on the attribute's
own words and the reference only, never on what else is loaded.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.encode import encode, encode_word
from braces_cli.core.errors import ConfigError, DataError, ModelError, near_misses
from braces_cli.core.experts import MixtureFFN
from braces_cli.core.ffn import FFN, layer_stack
from braces_cli.core.files import write_tensors
from braces_cli.core.fingerprint import differences
from braces_cli.core.models import input_device
from braces_cli.core.progress import Report, silent
from braces_cli.core.relevance import gram
from braces_cli.core.session import Session

FORMAT_VERSION = "1"
REFERENCE = "neutral"
# Without training, s = 1 is a push of this share of the median residual norm after the layer.
PUSH = 0.05
# Attributes that an adapter was trained with, in its folder.
TRAINED_FILE = "attributes.safetensors"
_OTHER_FILES = {"attributes", "adapter_model", "model"}
_PARTS = ("hidden", "reference", "residual", "scale")
_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class Attribute:
    """One attribute of one base; all tensors in float32 on the CPU.

    Attributes:
        name: of the attribute.
        words: it was built from.
        hidden: pooled FFN inputs of the words, (layers, d).
        reference: pooled FFN inputs of the neutral words, (layers, d).
        residual: median norm of the residual stream behind each layer over shipped neutral text, (layers,).
        scale: what makes `scale * W_V W_V^T p` a push of 5 % of `residual`, (layers,); for steering without training.
        layers: decoder layer of each row.
        fingerprint: of the base.
    """

    name: str
    words: list[str]
    hidden: Tensor
    reference: Tensor
    residual: Tensor
    scale: Tensor
    layers: list[int]
    fingerprint: dict[str, Any]

    @property
    def state(self) -> Tensor:
        """p = pooled(words) - pooled(reference), (layers, d)."""
        return self.hidden - self.reference


def save_attributes(path: Path, attributes: Sequence[Attribute]) -> None:
    """Write attributes of one base into a file: tensors `{name}.hidden` and so on, the rest in the header."""
    tensors = {f"{each.name}.{part}": getattr(each, part) for each in attributes for part in _PARTS}
    header = {
        "format_version": FORMAT_VERSION,
        "attributes": json.dumps({each.name: each.words for each in attributes}, ensure_ascii=False),
        "layers": json.dumps(attributes[0].layers),
        "fingerprint": json.dumps(attributes[0].fingerprint),
    }
    write_tensors(path, tensors, header)


def check_name(name: str) -> str:
    """An attribute's name is also a file's name.

    Raises:
        ConfigError: it has other characters than letters, digits, `_`, `-` and dots inside.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"`{name}` cannot name an attribute", where="--attribute", hint="Use letters, digits, _ and -."
        )
    return name


def built_in() -> dict[str, list[str]]:
    """The word lists that come with braces, by name."""
    folder = resources.files("braces_cli.assets") / "words"
    lists = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt"):
            lists[file.name.removesuffix(".txt")] = file.read_text(encoding="utf-8").split("\n")[:-1]
    return lists


def read_words(path: Path) -> list[str]:
    """Words of a file, one a line; blank lines and lines that begin with `#` are left out.

    Raises:
        DataError: missing, not UTF-8, or no word in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), hint="Give a text file with one word a line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", where=str(path), hint="Give UTF-8 text, one word a line.") from error
    return clean_words([line for line in lines if not line.lstrip().startswith("#")], str(path))


def clean_words(words: Sequence[str], where: str) -> list[str]:
    """Words without surrounding space, empty ones and repeats, in the order given.

    Raises:
        DataError: none is left.
    """
    found = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not found:
        raise DataError("no words", where=where, hint="Give at least one word.")
    return found


def build_attribute(session: Session, name: str, words: Sequence[str], report: Report = silent) -> Attribute:
    """Pool words through the bare base; an adapter that is attached stays out of it."""
    base, ffns = session.base, session.ffns
    with ExitStack() as stack:
        if session.adapter is not None:
            stack.enter_context(session.adapter.disabled())
        hidden = pool_words(base.model, base.tokenizer, ffns, words, report)
        reference = pool_words(base.model, base.tokenizer, ffns, built_in()[REFERENCE])
        residual = residual_norms(base.model, base.tokenizer, ffns)
    push = torch.stack([gram_vector(ffn, p).norm() for ffn, p in zip(ffns, hidden - reference, strict=True)])
    layers = [ffn.layer for ffn in ffns]
    scale = _scale(residual, push)
    return Attribute(name, list(words), hidden, reference, residual, scale, layers, base.fingerprint(ffns))


def _scale(residual: Tensor, push: Tensor) -> Tensor:
    """What makes s = 1 a push of 5 %; where there is no direction, no push rather than a division by zero."""
    return torch.where(push > 0, PUSH * residual / push, torch.zeros_like(push))


def opposite(session: Session, one: Attribute, other: Attribute) -> tuple[Attribute, Attribute]:
    """Two attributes as the ends of one axis: p = (pooled(one) - pooled(other)) / 2, and minus that.

    The reference of both is their middle.
    """
    middle = (one.hidden + other.hidden) / 2
    push = torch.stack([gram_vector(f, p).norm() for f, p in zip(session.ffns, one.hidden - middle, strict=True)])
    scale = _scale(one.residual, push)
    return replace(one, reference=middle, scale=scale), replace(other, reference=middle, scale=scale)


def gram_vector(ffn: FFN | MixtureFFN, state: Tensor) -> Tensor:
    """W_V W_V^T p of one layer, (d,), float32 on the CPU; of experts the mean over all of them."""
    each: list[Tensor] = []
    for part in ffn.parts:
        values = part.values()
        with torch.no_grad():
            moved = gram(values, state.to(values.device).unsqueeze(1)).squeeze(-1).float().cpu()
        each.append(moved.reshape(-1, len(state)))
    return torch.cat(each).mean(dim=0)


def pool_words(
    model: nn.Module, tokenizer: Any, ffns: Sequence[FFN | MixtureFFN], words: Sequence[str], report: Report = silent
) -> Tensor:
    """Mean FFN input over each word's tokens, then over words: (layers, d) in float32 on the CPU.

    Each word stands alone, without special tokens. Words of as many tokens share a batch, so there is no padding.
    """
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for word in words:
        ids = encode_word(tokenizer, word)
        if ids:
            groups[len(ids)].append(ids)
    device = input_device(model)
    total = torch.zeros(len(ffns), ffns[0].hidden_size)
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index, ffn in enumerate(ffns):
            stack.callback(ffn.watch(_keep_sum(seen, index)).remove)
        done = 0
        for rows in groups.values():
            for start in range(0, len(rows), 64):
                batch = torch.tensor(rows[start : start + 64], device=device)
                with torch.no_grad():
                    model(input_ids=batch, use_cache=False)
                total += torch.stack([seen[index] for index in range(len(ffns))]) / batch.shape[1]
                done += len(batch)
                report("pooling words", done, len(words))
    return total / max(done, 1)


def _keep_sum(seen: dict[int, Tensor], index: int) -> Any:
    def keep(h: Tensor) -> None:
        # (batch, tokens, d), or (batch * tokens, d) where a model flattens its tokens before the FFN.
        seen[index] = h.detach().float().flatten(0, -2).sum(dim=0).cpu()

    return keep


def residual_norms(model: nn.Module, tokenizer: Any, ffns: Sequence[FFN | MixtureFFN]) -> Tensor:
    """Median norm of the residual stream behind the layer of each FFN, over shipped neutral text: (layers,)."""
    text = (resources.files("braces_cli.assets") / "neutral_texts.txt").read_text(encoding="utf-8")
    stack = layer_stack(model)[1]
    device = input_device(model)
    norms: dict[int, list[Tensor]] = {ffn.layer: [] for ffn in ffns}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            norms[layer].append(hidden.detach().float().norm(dim=-1).flatten().cpu())

        return hook

    with ExitStack() as handles:
        for layer in norms:
            handles.callback(stack[layer].register_forward_hook(keep(layer)).remove)
        for line in text.splitlines():
            with torch.no_grad():
                model(input_ids=torch.tensor([encode(tokenizer, line).ids], device=device), use_cache=False)
    return torch.stack([torch.cat(norms[ffn.layer]).median() for ffn in ffns])


def load_attributes(path: Path, fingerprint: dict[str, Any]) -> dict[str, Attribute]:
    """Read an attribute file and hold it to the base it is used on.

    Raises:
        ModelError: damaged, or built for another base.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            own, layers = json.loads(header["fingerprint"]), json.loads(header["layers"])
            found = {}
            for name, words in json.loads(header["attributes"]).items():
                parts: dict[str, Any] = {part: file.get_tensor(f"{name}.{part}") for part in _PARTS}
                found[name] = Attribute(name, words, **parts, layers=layers, fingerprint=own)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelError(
            f"not an attribute file: {error}", where=str(path), hint="Build it again: attr-build."
        ) from error
    different = differences(own, fingerprint)
    if different:
        hint = "Build it again for this base: braces attr-build."
        raise ModelError(
            f"this attribute was built for another base ({'; '.join(different)})", where=str(path), hint=hint
        )
    return found


def find_attribute(session: Session, name: str, folder: Path | None, report: Report = silent) -> Attribute:
    """Look an attribute up: in `folder`, in the adapter's folder, then build it from the built-in word list.

    Raises:
        ConfigError: unknown everywhere; names what is known.
        ModelError: found, but damaged or of another base.
    """
    check_name(name)
    for path in _files(session, folder, name):
        found = load_attributes(path, session.base.fingerprint(session.ffns))
        if name in found:
            return found[name]
    lists = built_in()
    if name in lists:
        return build_attribute(session, name, lists[name], report)
    known = known_attributes(session, folder)
    hint = f"{near_misses(name, known)} Known: {', '.join(known)}. Build others with braces attr-build.".strip()
    raise ConfigError(f"unknown attribute `{name}`", where="--attribute", hint=hint)


def known_attributes(session: Session, folder: Path | None) -> list[str]:
    """Every name that `find_attribute` would find."""
    trained = session.config.attributes if session.config is not None else []
    places = [place for place in (folder, session.folder) if place is not None]
    files = {path.stem for place in places for path in place.glob("*.safetensors")} - _OTHER_FILES
    return sorted({*built_in(), *trained, *files})


def _files(session: Session, folder: Path | None, name: str) -> list[Path]:
    """Where an attribute may lie, in the order of looking."""
    places = [] if folder is None else [folder / f"{name}.safetensors"]
    if session.folder is not None:
        places += [session.folder / f"{name}.safetensors", session.folder / TRAINED_FILE]
    return [path for path in places if path.is_file()]
