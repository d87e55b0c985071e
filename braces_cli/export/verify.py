"""Prove an export: its logits, by plain transformers in a process of its own, against those of base and adapter.

How far two ways of computing the same numbers may differ is measured and not assumed: the adapter's logits are computed
once more with the output of each decoder layer off by at most one unit in the last place, and a merge that differs by
more than a few times of what that changes is no merge. In half precision an adapter may change less than rounding does;
whether its change is there at all then shows along the direction of that change, where rounding averages out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.files import disk_error, scratch_folder
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import layer_output, with_layer_output
from braces_cli.core.models.tokenize import all_ids, encode
from braces_cli.core.models.weights import OVERFLOW_HINT
from braces_cli.core.schema import WRITTEN, parse

PROBES = 8
# Few, because each costs a large model on a CPU seconds; what merging changes works on each token alone.
_TOKENS = 12
# Merging rounds a few times a layer otherwise than the adapter does, the yardstick once.
_ROUNDINGS = 4.0
# Share of the adapter's change that may seem to be missing: nothing for a merge, all of it for the bare base.
_MISSING = 0.5


@dataclass(frozen=True)
class Reference:
    """What the export must give.

    Attributes:
        texts: prompts.
        plain: their tokens as the base's tokenizer reads them.
        ids: tokens of the probes.
        logits: of the base, of base and adapter where there is one, (probes, tokens, vocabulary), float32.
        rounding: the largest change of a logit by one unit in the last place of each layer's output.
        effect: the largest change of a logit by adapter and steering, 0 where there is neither.
        direction: from the rounded logits to those of the bare base; that its noise is not that of `logits` matters.
        length: of the adapter's change along it.
        tied: the base's head is its embedding.
        device: where they were computed.
    """

    texts: list[str]
    plain: list[list[int]]
    ids: list[list[int]]
    logits: Tensor
    rounding: float
    effect: float
    direction: Tensor
    length: float
    tied: bool
    device: str

    @property
    def limit(self) -> float:
        """The largest difference that is still rounding."""
        return _ROUNDINGS * self.rounding

    def missing(self, logits: Tensor) -> float:
        """Which share of the adapter's change `logits` lack: 0 where they are the adapter's, 1 where the base's."""
        return float(((logits - self.logits) * self.direction).sum()) / self.length if self.length > 0 else 0.0


@dataclass(frozen=True)
class Loading:
    """How the process that proves an export loads it.

    Attributes:
        what: the export in the words of an error: `the adapter and its base in one`.
        code: the folder brings a modelling file, which may be run.
        loras: LoRA folders that peft adds to the checkpoint, with their scales.
    """

    what: str = "the adapter and its base in one"
    code: bool = False
    loras: Sequence[tuple[Path, float]] = ()


_MERGED = Loading()


@dataclass(frozen=True)
class Verification:
    """How far the merged checkpoint is from the adapter: `difference` in logits, `relative` to the largest logit, and
    the share of the adapter's change that is `missing`."""

    difference: float
    relative: float
    missing: float
    reference: Reference


def reference(
    session: Session, terms: Sequence[tuple[Attribute, float]] = (), layers: Collection[int] | None = None
) -> Reference:
    """Logits of the open base with its adapter, if there is one, steered, on neutral texts that come with braces.

    Raises:
        ModelError: they are not finite.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    text = (resources.files("braces_cli.assets") / "neutral_texts.txt").read_text(encoding="utf-8")
    texts = text.splitlines()[:PROBES]
    encoded = [encode(tokenizer, line).ids for line in texts]
    # Of one length, so that they are one batch without padding.
    length = min(_TOKENS, *map(len, encoded))
    ids = [row[:length] for row in encoded]
    with steered(session, terms, layers):
        logits = _logits(model, ids)
        if not bool(logits.isfinite().all()):
            raise ModelError("logits of base and adapter are not finite", where=session.base.name, hint=OVERFLOW_HINT)
        with _rounded(model):
            rounded = _logits(model, ids)
    with session.adapter.disabled() if session.adapter is not None else nullcontext():
        bare = _logits(model, ids)
    head = model.get_output_embeddings()
    return Reference(
        texts=texts,
        plain=[all_ids(tokenizer, line) for line in texts],
        ids=ids,
        logits=logits,
        rounding=furthest(rounded, logits),
        effect=furthest(bare, logits),
        direction=bare - rounded,
        length=float(((bare - logits) * (bare - rounded)).sum()),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        device=str(input_device(model)),
    )


def furthest(some: Tensor, others: Tensor) -> float:
    """The largest difference of two tensors."""
    return float((some - others).abs().max())


def _logits(model: Any, ids: Sequence[list[int]]) -> Tensor:
    batch = torch.tensor(ids, device=input_device(model))
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits.float().cpu()


@contextmanager
def _rounded(model: Any) -> Iterator[None]:
    """Inside, what leaves each decoder layer is off by up to one unit in the last place, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def perturb(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = layer_output(output)
        noise = 2 * torch.rand(hidden.shape, generator=generator) - 1
        moved = hidden.float() * (1 + torch.finfo(hidden.dtype).eps * noise.to(hidden.device))
        return with_layer_output(output, moved.to(hidden.dtype))

    with ExitStack() as stack:
        for layer in layer_stack(model)[1]:
            stack.callback(layer.register_forward_hook(perturb).remove)
        yield


def figures(proof: Verification) -> dict[str, Any]:
    """A proof as commands print and record it."""
    return {
        "max_logit_difference": proof.difference,
        "relative_difference": proof.relative,
        "rounding": proof.reference.rounding,
        "adapter_effect": proof.reference.effect,
        "effect_missing": proof.missing,
        "probes": len(proof.reference.ids),
    }


def verify_export(folder: Path, expected: Reference, loading: Loading = _MERGED) -> Verification:
    """Hold the checkpoint in `folder` to the reference. Hold no model while calling it: it loads one.

    Raises:
        ModelError: plain transformers cannot load it, finds a tensor missing or one too many, reads texts otherwise, or
            its logits differ by more than rounding.
    """
    loaded, logits = _ask(folder, expected, loading)
    for kind, names in loaded["keys"].items():
        if names:
            raise _no_merge(folder, loading, f"{kind.replace('_', ' ')}: {', '.join(names[:3])}")
    if loaded["tied"] != expected.tied:
        raise _no_merge(folder, loading, "its embeddings are tied otherwise than the base's")
    if loaded["ids"] != expected.plain:
        raise _no_merge(folder, loading, "its tokenizer reads a text otherwise than the base's")
    difference = furthest(logits, expected.logits)
    largest = float(expected.logits.abs().max())
    # Not `difference > limit`: NaN must fail.
    if not difference <= expected.limit:
        raise _no_merge(
            folder,
            loading,
            f"its logits differ from the adapter's by {difference:.2g}, rounding explains {expected.limit:.2g}",
        )
    missing = expected.missing(logits)
    if not missing <= _MISSING:
        raise _no_merge(folder, loading, f"{missing:.0%} of what the adapter changes is missing")
    return Verification(difference, difference / largest, missing, expected)


def _ask(folder: Path, expected: Reference, loading: Loading) -> tuple[dict[str, Any], Tensor]:
    """What `verify_process` says of the checkpoint, and its logits."""
    from safetensors import safe_open

    with scratch_folder() as work:
        request, answer = work / "request.json", work / "answer.safetensors"
        question = {
            "texts": expected.texts,
            "ids": expected.ids,
            "device": expected.device,
            "code": loading.code,
            "loras": [(str(path), scale) for path, scale in loading.loras],
        }
        request.write_text(json.dumps(question), encoding="utf-8")
        program = Path(__file__).with_name("verify_process.py")
        # -I: neither the working directory nor PYTHONPATH is looked into for modules.
        call = [sys.executable, "-I", str(program), str(folder), str(request), str(answer)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env)
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            if done.returncode < 0:
                raise BracesError(
                    f"the process that proves the export was ended by signal {-done.returncode}",
                    where=str(folder),
                    hint="Was there memory for the model?",
                )
            full = disk_error(last, answer)
            if full is not None:
                raise full
            raise _no_merge(folder, loading, f"plain transformers cannot load it: {last.strip()}")
        with safe_open(answer, framework="pt") as file:
            header = file.metadata() or {}
            logits = file.get_tensor("logits")
    return parse(WRITTEN, header["probe"], str(answer)), logits


def _no_merge(folder: Path, loading: Loading, reason: str) -> ModelError:
    return ModelError(f"not {loading.what}: {reason}", where=str(folder), hint="Nothing was written or changed.")
