"""Compare the logits of repeng with those of braces: an attribute, exported as a control vector and applied by repeng.

One forward pass per prompt, float32 on the CPU, the base model without an adapter, layer 0 unsteered as in the file.
Runs in an environment with repeng (`pip install repeng`, which needs numpy < 2); `--braces` is the Python of an
environment with braces and its extra `export`:

    REPENG/bin/python recipes/serve/repeng_vector.py --braces BRACES/bin/python --model M --attribute positive --s 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("Once upon a time", "The film was", "In the morning the old man", "There was a", "She found it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--braces", help="Python with braces")
    parser.add_argument("--model", required=True)
    parser.add_argument("--attribute", default="positive")
    parser.add_argument("--s", type=float, default=3.0)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.write is not None:
        ours(args)
        return
    if args.braces is None:
        parser.error("--braces is required")
    with tempfile.TemporaryDirectory() as work:
        which = ["--model", args.model, "--attribute", args.attribute, f"--s={args.s}"]
        run(args.braces, Path(__file__).resolve(), *which, "--write", work)
        print(json.dumps(compared(args.model, Path(work)), indent=2))


def run(*call: object) -> None:
    """Run a Python with the package of this checkout."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run(list(map(str, call)), check=True, stdout=sys.stderr, env=env)


def ours(args: argparse.Namespace) -> None:
    """Write the vector, and the logits of braces with and without steering; runs in the environment of braces."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.options import LoadOptions
    from braces_cli.export.control_vector import export_control_vector

    session = open_session(args.model, None, LoadOptions(device="cpu", dtype="float32"))
    terms = [(find_attribute(session, args.attribute, None), args.s)]
    layers = [ffn.layer for ffn in session.ffns if ffn.layer > 0]
    export_control_vector(session, terms, layers, args.write / "vector.gguf")
    prompts = [session.base.tokenizer(text)["input_ids"] for text in PROMPTS]
    plain = logits(session.base.model, prompts)
    with steered(session, terms, layers):
        found = {"prompts": prompts, "plain": plain, "steered": logits(session.base.model, prompts)}
    torch.save(found, args.write / "logits.pt")


def logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids]), use_cache=False).logits for ids in prompts]


def compared(name: str, work: Path) -> dict[str, Any]:
    """Return the differences of the logits of repeng at coefficient 1 from those of braces."""
    from repeng import ControlModel, ControlVector
    from transformers import AutoModelForCausalLM

    wanted = torch.load(work / "logits.pt")
    vector = ControlVector.import_gguf(work / "vector.gguf")
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    model = ControlModel(base, sorted(vector.directions))
    plain = logits(model, wanted["prompts"])
    model.set_control(vector, 1.0)
    steered = logits(model, wanted["prompts"])
    return {
        "layers": sorted(vector.directions),
        "tokens": sum(map(len, wanted["prompts"])),
        "unsteered_difference": difference(plain, wanted["plain"]),
        "steered_difference": difference(steered, wanted["steered"]),
        # Must not be 0, or the comparison is meaningless.
        "changed_by_it": difference(wanted["plain"], wanted["steered"]),
    }


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference of a logit divided by the largest logit, over all prompts."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


if __name__ == "__main__":
    main()
