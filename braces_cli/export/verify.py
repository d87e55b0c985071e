"""Verify an export: its logits in plain transformers, in another process, against those of base and adapter.

The limit of the difference is measured: the logits of base and adapter are computed a second time with the output of
each decoder layer changed by at most one unit in the last place, and the export may differ by a few times that change.
In half precision an adapter may change less than rounding does. The projection of the difference on the direction of
the adapter's change, where rounding averages out, shows whether the change is there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from braces_cli.core.files import scratch_folder
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import add_to_output, layer_output, with_layer_output
from braces_cli.core.models.tokenize import encode, token_ids
from braces_cli.core.models.weights import OVERFLOW_HINT
from braces_cli.core.schema import WRITTEN, parse

# A module, and a vector (d,) that is added to its output.
Moved = tuple[nn.Module, Tensor]
PROBES = 8
# Few, because a large model on a CPU needs seconds for each; an export acts on each token alone.
_TOKENS = 12
# An export rounds a few times per layer, the measured change once.
_ROUNDINGS = 4.0
# Largest share of the adapter's change that may be missing; about 0 for an exact export, 1 for the bare base.
_MISSING = 0.5


@dataclass(frozen=True)
class Reference:
    """Logits that the export must have.

    Attributes:
        question: input of the verification process: prompts, tokens of the probes (of one length), device of the base.
        text_ids: tokens of the prompts with special tokens.
        logits: of base and adapter, steered, (probes, tokens, vocabulary), float32.
        rounding: largest change of a logit if each layer's output changes by one unit in the last place.
        effect: largest change of a logit by adapter and steering.
        direction: logits of the bare base minus the rounded logits, whose noise is independent of that of `logits`.
        length: length of the adapter's change along `direction`.
    """

    question: dict[str, Any]
    text_ids: list[list[int]]
    logits: Tensor
    rounding: float
    effect: float
    direction: Tensor
    length: float

    def missing(self, logits: Tensor) -> float:
        """Share of the adapter's change that is missing in `logits`: 0 if they are the adapter's, 1 if the base's."""
        return float(((logits - self.logits) * self.direction).sum()) / self.length if self.length > 0 else 0.0


def reference(
    session: Session,
    terms: Sequence[tuple[Attribute, float]] = (),
    layers: Collection[int] | None = None,
    erase: dict[int, Tensor] | None = None,
) -> Reference:
    """Compute the logits of base and adapter, steered or with directions erased, on the package's neutral texts.

    Raises:
        ModelError: they are not finite.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    texts, ids = _probes(tokenizer)
    with steered(session, terms, layers, erase=erase):
        logits = _logits(model, ids)
        if not bool(logits.isfinite().all()):
            raise ModelError("logits of base and adapter are not finite", where=session.base.name, hint=OVERFLOW_HINT)
        with _rounded(model):
            rounded = _logits(model, ids)
    with session.bare():
        bare = _logits(model, ids)
    return Reference(
        question={"texts": texts, "ids": ids, "device": str(input_device(model))},
        text_ids=[token_ids(tokenizer, line) for line in texts],
        logits=logits,
        rounding=float((rounded - logits).abs().max()),
        effect=float((bare - logits).abs().max()),
        direction=bare - rounded,
        length=float(((bare - logits) * (bare - rounded)).sum()),
    )


def _probes(tokenizer: Any) -> tuple[list[str], list[list[int]]]:
    """Return the neutral texts of the probes, and their tokens, cut to one length: a batch without padding."""
    text = (resources.files("braces_cli.assets") / "neutral_texts.txt").read_text(encoding="utf-8")
    texts = text.splitlines()[:PROBES]
    encoded = [encode(tokenizer, line).ids for line in texts]
    length = min(_TOKENS, *map(len, encoded))
    return texts, [row[:length] for row in encoded]


def check_vectors(session: Session, vectors: Sequence[Moved], exported: Sequence[Moved]) -> dict[str, float]:
    """Compare the logits of the model with vectors added to some modules and with `exported` added to others.

    Raises:
        ModelError: they differ by more than rounding.
    """
    model, (_, ids) = session.base.model, _probes(session.base.tokenizer)

    def logits(added: Sequence[Moved], rounded: bool = False) -> Tensor:
        with ExitStack() as stack:
            for module, vector in added:
                stack.callback(add_to_output(module, vector).remove)
            if rounded:
                stack.enter_context(_rounded(model))
            return _logits(model, ids)

    expected = logits(vectors)
    rounding = float((logits(vectors, rounded=True) - expected).abs().max())
    difference = float((logits(exported) - expected).abs().max())
    if not difference <= _ROUNDINGS * rounding:
        limit = _ROUNDINGS * rounding
        reason = f"its logits differ from those of the steering by {difference:.2g}, rounding explains {limit:.2g}"
        raise _failed(session.base.name, reason)
    return {"max_logit_difference": difference, "rounding": rounding}


def _logits(model: Any, ids: Sequence[list[int]]) -> Tensor:
    batch = torch.tensor(ids, device=input_device(model))
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits.float().cpu()


@contextmanager
def _rounded(model: Any) -> Iterator[None]:
    """Change the output of each decoder layer by up to one unit in the last place, with a fixed seed."""
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


def verify_export(
    folder: Path, expected: Reference, code: bool = False, loras: Sequence[Path] = (), base_dtype: str | None = None
) -> dict[str, Any]:
    """Compare the checkpoint in `folder` with the reference. Free the base before: another process loads the export.

    Args:
        code: the folder has a modelling file, which may be run.
        loras: LoRA folders that peft adds to the checkpoint.
        base_dtype: set if the folder is the base's, which may hold tensors that are not loaded.

    Returns:
        The measured differences, as commands print and record them.

    Raises:
        ModelError: plain transformers cannot load the checkpoint, tensors are missing or left over, the tokens of a
            text differ, or the logits differ by more than rounding.
    """
    from safetensors import safe_open

    question = {**expected.question, "code": code, "dtype": base_dtype or "auto", "loras": list(map(str, loras))}
    with scratch_folder() as work:
        request, answer = work / "request.json", work / "answer.safetensors"
        request.write_text(json.dumps(question), encoding="utf-8")
        program = Path(__file__).with_name("verify_process.py")
        # -I: modules come neither from the working directory nor from PYTHONPATH.
        call = [sys.executable, "-I", str(program), str(folder), str(request), str(answer)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env)
        if done.returncode < 0:
            what = f"the verification process was ended by signal {-done.returncode}"
            raise BracesError(what, where=str(folder), hint="Check that there is memory for the model.")
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            raise _failed(folder, f"plain transformers cannot load it: {last.strip()}")
        with safe_open(answer, framework="pt") as file:
            loaded = parse(WRITTEN, file.metadata()["probe"], str(answer))
            logits = file.get_tensor("logits")
    for kind, names in loaded["keys"].items() if base_dtype is None else ():
        if names:
            raise _failed(folder, f"{kind.replace('_', ' ')}: {', '.join(names[:3])}")
    if loaded["ids"] != expected.text_ids:
        raise _failed(folder, "its tokenizer gives other tokens than the base's")
    difference, limit = float((logits - expected.logits).abs().max()), _ROUNDINGS * expected.rounding
    # Not `difference > limit`: NaN must fail.
    if not difference <= limit:
        reason = f"its logits differ from the adapter's by {difference:.2g}, rounding explains {limit:.2g}"
        raise _failed(folder, reason)
    missing = expected.missing(logits)
    if not missing <= _MISSING:
        raise _failed(folder, f"{missing:.0%} of the adapter's change is missing")
    return {
        "max_logit_difference": difference,
        "relative_difference": difference / float(expected.logits.abs().max()),
        "rounding": expected.rounding,
        "adapter_effect": expected.effect,
        "effect_missing": missing,
        "probes": len(expected.logits),
    }


def _failed(folder: Path | str, reason: str) -> ModelError:
    hint = "Nothing was written or changed."
    return ModelError(f"the export does not match base and adapter: {reason}", where=str(folder), hint=hint)
