"""Peak memory and time of a merge with the shape of an 8B Llama and random bfloat16 weights.

    python recipes/serve/merge_memory.py --layers 32 --work FOLDER      (16 GB of base, 16 GB of merged model)

Prints one JSON document and deletes the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RANK = 16
SHAPE = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip


def write_base(folder: Path, layers: int) -> int:
    """Write a checkpoint of random weights, one file per layer; return the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        layer = re.match(r"model\.layers\.\d+", name)
        groups.setdefault(layer.group() if layer else name, {})[name] = tensor.shape
    weight_map, total = {}, 0
    for index, shapes in enumerate(groups.values(), start=1):
        file = f"model-{index:05}-of-{len(groups):05}.safetensors"
        made = {n: torch.randn(s, dtype=torch.bfloat16) * 0.02 if len(s) > 1 else torch.ones(s, dtype=torch.bfloat16)
                for n, s in shapes.items()}  # fmt: skip
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, file)
        total += sum(t.numel() * 2 for t in made.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return total


def write_adapter(base: Path, folder: Path) -> None:
    """Write a random adapter of the base."""
    import torch

    from braces_cli.core.adapter.model import AdapterConfig, attach
    from braces_cli.core.models.load import load_base
    from braces_cli.core.options import LoadOptions

    loaded = load_base(str(base), LoadOptions(device="cpu"))
    adapter = attach(loaded.model, RANK)
    with torch.no_grad():
        for _, adapter_layer in adapter.adapted_ffns:
            adapter_layer.gate.fill_(-1.0)
    adapter.save(folder, AdapterConfig(str(base), RANK, adapter.layers, loaded.sizes), "# random\n")


def watched(call: list[str]) -> dict[str, Any]:
    """Run a command; return seconds and the peak resident memory of the process and of its children, in bytes."""
    peaks = {"merge": 0, "proof": 0, "together": 0}
    start = time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        while process.poll() is None:
            own, others = _resident(process.pid), sum(_resident(child) for child in _children(process.pid))
            for name, value in (("merge", own), ("proof", others), ("together", own + others)):
                peaks[name] = max(peaks[name], value)
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    out, _ = process.communicate()
    thread.join()
    if process.returncode:
        sys.exit(process.returncode)
    return {"seconds": time.perf_counter() - start, "peak_memory": peaks, "result": json.loads(out)}


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, help="where the checkpoints go (default: the temporary folder)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="braces-merge-", dir=args.work))
    try:
        (work / "base").mkdir()
        size = write_base(work / "base", args.layers)
        write_adapter(work / "base", work / "adapter")
        call = ["merge", "--adapter", work / "adapter", "--output-dir", work / "merged", "--device", "cpu"]
        found = watched([sys.executable, "-m", "braces_cli", *map(str, call), "--format", "json"])
    finally:
        shutil.rmtree(work)
    layer = 2 * sum((3 * 4096 * 14_336, 2 * 4096 * 4096, 2 * 4096 * 1024))
    document = {"layers": args.layers, "model_bytes": size, "layer_bytes": layer, "rank": RANK, **found}
    document["result"] = {
        k: found["result"][k] for k in ("max_logit_difference", "rounding", "adapter_effect", "probes")
    }
    json.dump(document, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
