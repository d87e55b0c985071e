"""`braces eval` as a whole process against lm-eval's own command line, and several adapters against several runs.

Both measure the same random Llama on the same local rows: a task of choices and one of generation. What `braces eval`
says is held to what lm-eval says, so that neither can be fast by doing less.

    eval_vs_lm_eval   braces eval on a base alone / lm_eval --model hf
    adapters_vs_runs  one run of three adapters / three times the run of the base alone (a run of one adapter is slower)

python recipes/bench/evaluation.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _bench import interleave, medians, parse, ratio, report, timed

REPEATS = 7
ADAPTERS = 3
RANK = 8
# Documents of each task: few enough that seven repeats take less than four minutes on two cores.
DOCUMENTS = {"piqa": 100, "nq_open": 4}
QUICK = {"piqa": 4, "nq_open": 1}
BATCH = 16


def write_model(folder: Path) -> None:
    """A random Llama whose tokenizer knows bytes only."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_adapters(model: Path, folder: Path) -> list[Path]:
    """Fresh adapters of the model, each of another seed."""
    from braces_cli.core.adapter.model import AdapterConfig, attach
    from braces_cli.core.models.load import load_base, tokenizer_hashes
    from braces_cli.core.models.options import LoadOptions

    base = load_base(str(model), LoadOptions(device="cpu"))
    made = []
    for seed in range(ADAPTERS):
        adapter = attach(base.model, RANK, seed=seed)
        config = AdapterConfig(
            base.name, RANK, adapter.layers, base.fingerprint(), tokenizer=tokenizer_hashes(base.tokenizer)
        )
        made.append(folder / f"adapter{seed}")
        adapter.save(made[-1], config, "# A fresh adapter\n")
        adapter.detach()
    return made


def write_rows(folder: Path, documents: dict[str, int]) -> dict[str, Path]:
    """A file of rows for each task, in its own schema."""
    rows: dict[str, list[dict[str, Any]]] = {
        "piqa": [
            {"goal": f"To move {i} boxes upstairs", "sol1": "carry each of them" + " slowly" * (i % 3),
             "sol2": f"carry {i} at once", "label": i % 2} for i in range(documents["piqa"])
        ],
        "nq_open": [
            {"question": f"how many boxes are {i} and {i}", "answer": [str(2 * i)]} for i in range(documents["nq_open"])
        ],
    }  # fmt: skip
    files = {}
    for name, listed in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    return files


def write_definitions(folder: Path, files: dict[str, Path]) -> None:
    """The same tasks for lm-eval's command line, reading the same files."""
    import lm_eval

    for name, file in files.items():
        source = Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml"
        data = {"data_files": dict.fromkeys(("train", "validation"), str(file)), "cache_dir": str(folder / "cache")}
        lines = [
            f"include: {source}", f"task: bench_{name}", "dataset_path: json", "dataset_name: null",
            f"dataset_kwargs: {json.dumps(data)}",
        ]  # fmt: skip
        (folder / f"bench_{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def process(said: dict[str, str], name: str, *argv: object) -> Callable[[], None]:
    """Run Python with `argv`, from start to exit, and keep what it printed."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def work() -> None:
        done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr}")
        said[name] = done.stdout

    return work


def check_equal(printed: str, folder: Path) -> None:
    """Hold the values of both programs together: who does less would look fast."""
    theirs = json.loads(next(folder.rglob("results*.json")).read_text(encoding="utf-8"))["results"]
    for task, metrics in json.loads(printed)["systems"][0]["results"].items():
        for metric, entry in metrics.items():
            found = [value for key, value in theirs[f"bench_{task}"].items() if key.partition(",")[0] == metric]
            if not any(abs(entry["value"] - value) < 1e-9 for value in found):
                sys.exit(f"{task} {metric}: {entry['value']} by braces, {found} by lm-eval")


def main() -> None:
    args = parse(__doc__, None, REPEATS)
    documents = QUICK if args.quick else DOCUMENTS
    with tempfile.TemporaryDirectory(prefix="braces-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model = folder / "model"
        write_model(model)
        adapters = write_adapters(model, folder)
        files = write_rows(folder, documents)
        write_definitions(folder, files)
        data = [part for task, file in files.items() for part in ("--task-data", f"{task}={file}")]
        ours = ["-m", "braces_cli", "eval", "--tasks", ",".join(files), *data, "--batch-size", BATCH]
        ours += ["--device", "cpu", "--format", "json", "--model", model]
        theirs = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", "--device", "cpu"]
        theirs += ["--tasks", ",".join(f"bench_{task}" for task in files), "--include_path", folder]
        theirs += ["--batch_size", BATCH, "--output_path", folder / "theirs"]
        beside = [part for each in adapters for part in ("--adapter", each)]
        said: dict[str, str] = {}
        programs = {
            "braces": process(said, "braces", *ours),
            "lm_eval": process(said, "lm_eval", *theirs),
            "adapters": process(said, "adapters", *ours, *beside, "--no-base"),
        }
        work = {each: timed(run) for each, run in programs.items()}
        times = interleave(work, args.repeats, args.seconds, warmup=0 if args.quick else 1)
        check_equal(said["braces"], folder / "theirs")
    ratios = {
        "eval_vs_lm_eval": ratio(times["braces"], times["lm_eval"], 1.05),
        "adapters_vs_runs": ratio(times["adapters"], [ADAPTERS * each for each in times["braces"]], 1.0),
    }
    settings = {
        "documents": documents,
        "batch_size": BATCH,
        "adapters": ADAPTERS,
        "repeats": len(times["braces"]),
        "quick": args.quick,
        "seconds": medians(times),
    }
    report(settings, ratios)


if __name__ == "__main__":
    main()
