"""Serve a base with slots, an adapter and an attribute as LoRA files by llama-server, with scales in each request.

Greedy continuations of fifty prompts at each strength, float32 weights and KV cache on the CPU, compared with braces.
The server is started once with `--lora-scaled`; each request then names its scales. Needs a llama.cpp source tree with
`llama-server` built (see `llama_cpp.py`), and the packages gguf and peft:

    python recipes/serve/llama_server.py --llama-cpp LLAMA_CPP --model M --adapter A --attribute positive --s -2 0 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as common


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--server", type=Path, help="llama-server (default: build/bin/llama-server in the tree)")
    parser.add_argument("--model", help="base model (default: the adapter's own)")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--attribute", default="positive")
    parser.add_argument("--s", type=float, nargs="+", default=[-2.0, 0.0, 3.0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep the exported files here (default: a temporary folder)")
    return parser.parse_args(argv)


def export(args: argparse.Namespace, work: Path) -> tuple[Path, list[Path]]:
    """Export the base with slots as GGUF, and the LoRA files of adapter and attribute."""
    model = ["--model", args.model] if args.model else []
    if not model:
        config = json.loads((Path(args.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        model = ["--model", config["base_model_name_or_path"]]
    slots, base = work / "slots", work / "slots.gguf"
    plain = ["--dtype", "float32", "--device", "cpu"]
    common.braces("export", "slots", *model, *plain, "--output-dir", slots)
    call = ["export", "lora", "--base", slots, "--adapter", args.adapter, *model, "--device", "cpu"]
    files = [work / "adapter.gguf", work / "attribute.gguf"]
    common.braces(*call, "--output-dir", work / "adapter", "--gguf", files[0])
    steer = ["--attribute", args.attribute]
    common.braces(*call, *steer, "--output-dir", work / "attribute", "--gguf", files[1])
    convert = [args.llama_cpp / "convert_hf_to_gguf.py", slots, "--outtype", "f32", "--outfile", base]
    subprocess.run([sys.executable, *map(str, convert)], check=True, capture_output=True)
    return base, files


def same_as_converted(args: argparse.Namespace, work: Path) -> bool:
    """Return True if the tensors of the exported GGUF files are bit-identical to those of llama.cpp's converter."""
    import gguf
    import numpy

    same = True
    for name in ("adapter", "attribute"):
        theirs = work / f"{name}-converted.gguf"
        call = [args.llama_cpp / "convert_lora_to_gguf.py", work / name, "--base", work / "slots", "--outfile", theirs]
        subprocess.run([sys.executable, *map(str, call)], check=True, capture_output=True)
        ours, found = (gguf.GGUFReader(path) for path in (work / f"{name}.gguf", theirs))
        one, other = ({t.name: t.data for t in reader.tensors} for reader in (ours, found))
        alpha = [reader.fields["adapter.lora.alpha"].contents() for reader in (ours, found)]
        same &= one.keys() == other.keys() and all(numpy.array_equal(one[key], other[key]) for key in one)
        same &= alpha[0] == alpha[1]
    return same


def ask(address: str, ids: list[int], tokens: int, scale: float) -> list[int]:
    """Return greedy tokens with the adapter at scale 1 and the attribute at `scale`, for this request only."""
    body = {
        "prompt": ids,
        "n_predict": tokens,
        "temperature": 0,
        "return_tokens": True,
        "cache_prompt": False,
        "lora": [{"id": 0, "scale": 1.0}, {"id": 1, "scale": scale}],
    }
    found: list[int] = common.ask(address, "completion", body)["tokens"]
    return found


def main() -> None:
    args = arguments()
    if Path(args.adapter).is_dir():
        args.adapter = str(Path(args.adapter).resolve())  # the command line runs in the checkout
    session = common.opened(args)
    stops = common.ends(session)
    texts = [opening + subject for opening in common.OPENINGS for subject in common.SUBJECTS]
    prompts = [session.base.tokenizer(text)["input_ids"] for text in texts]
    wanted = {s: ours(session, prompts, args.attribute, s, args.tokens) for s in args.s}
    del session
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        base, files = export(args, work)
        result: dict[str, Any] = {"same_as_converter": same_as_converted(args, work)}
        extra = ["--lora-scaled", ",".join(f"{file}:1" for file in files)]
        with common.served(args, base, extra=extra) as address:
            # All strengths of a prompt in turn, so that the scale changes with each request.
            rows = [[ask(address, ids, args.tokens, s) for s in args.s] for ids in prompts]
    for place, s in enumerate(args.s):
        cut = [common.cut_behind(row[place], stops) for row in rows]
        result[f"s={s:g}"] = common.agreement(wanted[s], cut, stops)
    first, last = wanted[args.s[0]], wanted[args.s[-1]]
    result["prompts_that_the_strength_changes"] = sum(a != b for a, b in zip(first, last, strict=True))
    json.dump(result, sys.stdout, indent=2)
    print()


def ours(session: Any, prompts: Sequence[list[int]], attribute: str, s: float, tokens: int) -> list[list[int]]:
    """Return greedy tokens of braces."""
    import torch
    from transformers import GenerationConfig

    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.lookup import find_attribute

    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=common.ends(session), pad_token_id=0)
    found = []
    with steered(session, [(find_attribute(session, attribute, None), s)]), torch.no_grad():
        for ids in prompts:
            output = session.base.model.generate(torch.tensor([ids]), generation_config=config)
            found.append(output[0, len(ids) :].tolist())
    return found


if __name__ == "__main__":
    main()
