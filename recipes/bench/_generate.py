"""What a user would write instead of `braces steer`: a model, a file of prompts, transformers' `generate` in batches.

python recipes/bench/_generate.py --model M --prompts FILE --output FILE [--control] [--batch-size 8] [--tokens 20]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def controlled(model: Any) -> Any:
    """`model` with a small random vector of repeng's on every layer."""
    import torch
    from repeng import ControlModel

    layers = list(range(model.config.num_hidden_layers))
    wrapped = ControlModel(model, layers)
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    vectors = {layer: (1e-3 * torch.randn(width, generator=generator)).to(model.dtype) for layer in layers}
    wrapped.set_raw_control(vectors)
    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="one a line")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--control", action="store_true", help="steer with repeng")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    if args.control:
        model = controlled(model)
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    with args.output.open("w", encoding="utf-8") as file, torch.no_grad():
        for start in range(0, len(prompts), args.batch_size):
            batch = prompts[start : start + args.batch_size]
            inputs = tokenizer(batch, return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            output = model.generate(
                **inputs, max_new_tokens=args.tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            new = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for prompt, text in zip(batch, new, strict=True):
                file.write(json.dumps({"prompt": prompt, "text": text}) + "\n")


if __name__ == "__main__":
    main()
