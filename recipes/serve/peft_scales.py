"""Switch adapters and attributes by scale on a base with slots, in plain transformers and peft, without braces.

braces export slots --model M --output-dir slots
braces export lora --base slots --adapter A --output-dir adapter
braces export lora --base slots --adapter A --attribute positive --output-dir positive
python recipes/serve/peft_scales.py --slots slots --lora adapter=1 --lora positive=-2,0,3 --prompt "The film was"
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=Path, required=True, help="what braces export slots wrote")
    parser.add_argument("--lora", action="append", required=True, help="FOLDER=SCALE,SCALE,...; repeatable")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable")
    parser.add_argument("--tokens", type=int, default=40)
    return parser.parse_args(argv)


def loaded(slots: Path, folders: Sequence[str]) -> Any:
    """Load the base with every LoRA."""
    base = AutoModelForCausalLM.from_pretrained(slots, dtype="auto")
    model: Any = PeftModel.from_pretrained(base, folders[0], adapter_name=name_of(folders[0]))
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=name_of(folder))
    return model.eval()


def name_of(folder: str) -> str:
    return Path(folder).name


def set_scales(model: Any, scales: dict[str, float]) -> None:
    """Activate these LoRA files at these scales."""
    model.base_model.set_adapter(list(scales))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, scale in scales.items():
                module.set_scale(name, scale)


def main() -> None:
    args = arguments()
    wanted = {folder: list(map(float, scales.split(","))) for folder, scales in (x.split("=") for x in args.lora)}
    model = loaded(args.slots, list(wanted))
    tokenizer = AutoTokenizer.from_pretrained(args.slots)
    for values in itertools.product(*wanted.values()):
        scales = {name_of(folder): value for folder, value in zip(wanted, values, strict=True)}
        set_scales(model, scales)
        for prompt in args.prompt:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                output = model.generate(input_ids=ids, max_new_tokens=args.tokens, do_sample=False)
            text = tokenizer.decode(output[0], skip_special_tokens=True)
            print(json.dumps({"scales": scales, "text": text}, ensure_ascii=False))


if __name__ == "__main__":
    main()
