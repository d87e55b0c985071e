"""A control vector that repeng itself trains from the words and templates of `steering.py`, as a GGUF file.

Run     PYTHONPATH=. REPENG/bin/python recipes/studies/repeng_train.py --model M --method pca_diff --out vector.gguf
Needs   an environment with repeng 0.4 (`pip install repeng`: it asks for numpy < 2, braces for a newer one); of braces
        only this checkout on the path; a causal LM
Shows   a JSON line: layers and the lengths of their vectors. `steering.py --method vector:vector.gguf=...` steers by it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _pairs import pairs
from repeng import ControlVector, DatasetEntry
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=("pca_diff", "pca_center"), default="pca_diff", help="repeng's own default")
    parser.add_argument("--dtype", default="auto", help="of the weights")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.gguf")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # repeng trains in batches and takes each text's last token that is not padding.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    entries = [DatasetEntry(positive, negative) for positive, negative in pairs()]
    vector = ControlVector.train(model, tokenizer, entries, method=args.method)
    vector.export_gguf(args.out)
    lengths = {layer: float((direction**2).sum() ** 0.5) for layer, direction in sorted(vector.directions.items())}
    print(json.dumps({"pairs": len(entries), "method": args.method, "lengths": lengths, "path": str(args.out)}))


if __name__ == "__main__":
    main()
