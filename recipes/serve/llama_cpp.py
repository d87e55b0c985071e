"""Compare the tokens of llama.cpp with those of braces: an adapter is merged, converted to GGUF and served.

Greedy continuations, float32 weights and KV cache, on the CPU. With --attribute, the attribute is also compared as a
control vector on the merged model. Needs a llama.cpp source tree and its `llama-server`:

    cmake -S LLAMA_CPP -B LLAMA_CPP/build -DGGML_NATIVE=ON && cmake --build LLAMA_CPP/build --target llama-server
    python recipes/serve/llama_cpp.py --llama-cpp LLAMA_CPP --model M --adapter A --attribute positive --s 2
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Beginnings of sentences; all combinations are fifty prompts.
OPENINGS = ("Once upon a time", "The film was", "One day", "In the morning", "There was a")
SUBJECTS = ("", " little", " the", " he", " she", " my", " and", " old", " very", " friend")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--server", type=Path, help="llama-server (default: build/bin/llama-server in the tree)")
    parser.add_argument("--model", help="base model (default: the adapter's own)")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--attribute", help="also compare it as a control vector on the merged model")
    parser.add_argument("--s", type=float, default=1.0)
    parser.add_argument("--prompts", type=Path, help="one a line (default: fifty beginnings of sentences)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def braces(*words: object) -> None:
    """Run the command line of this checkout."""
    call = [sys.executable, "-m", "braces_cli", *map(str, words)]
    subprocess.run(call, check=True, cwd=Path(__file__).parents[2], stdout=sys.stderr)


def ours(args: argparse.Namespace, prompts: Sequence[list[int]], attribute: str | None) -> list[list[int]]:
    """Return greedy token ids of base and adapter in braces, one prompt at a time."""
    import torch
    from transformers import GenerationConfig

    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.lookup import find_attribute

    session = opened(args)
    model = session.base.model
    terms = [(find_attribute(session, attribute, None), args.s)] if attribute else []
    # llama.cpp has no vector for layer 0.
    layers = [ffn.layer for ffn in session.ffns if ffn.layer > 0]
    config = GenerationConfig(max_new_tokens=args.tokens, do_sample=False, eos_token_id=ends(session), pad_token_id=0)
    found = []
    with steered(session, terms, layers), torch.no_grad():
        for ids in prompts:
            output = model.generate(torch.tensor([ids]), generation_config=config)
            found.append(output[0, len(ids) :].tolist())
    return found


def opened(args: argparse.Namespace) -> Any:
    """Open a session of braces, in float32 on the CPU."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.options import LoadOptions

    return open_session(args.model, args.adapter, LoadOptions(device="cpu", dtype="float32"))


def ends(session: Any) -> list[int]:
    from braces_cli.core.models.tokenize import end_tokens

    return end_tokens(session.base.model, session.base.tokenizer)


@contextmanager
def served(args: argparse.Namespace, gguf: Path, extra: Sequence[object] = ()) -> Iterator[str]:
    """Start a llama-server for `gguf` with more options; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = args.server or args.llama_cpp / "build" / "bin" / "llama-server"
    call = [server, "-m", gguf, "--host", "127.0.0.1", "--port", port, "-t", args.threads, "-np", 1]
    call += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-ui", *extra]
    process = subprocess.Popen(list(map(str, call)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None:
                    sys.exit(f"llama-server ended with {process.returncode}")
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def theirs(address: str, prompts: Sequence[list[int]], tokens: int, stops: Sequence[int]) -> list[list[int]]:
    """Return greedy token ids of llama.cpp up to the first end token."""
    found = []
    for ids in prompts:
        body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        found.append(cut_behind(ask(address, "completion", body)["tokens"], stops))
    return found


def cut_behind(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Return the tokens up to and including the first end token."""
    place = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:place]


def agreement(ours: Sequence[list[int]], theirs: Sequence[list[int]], stops: Sequence[int]) -> dict[str, Any]:
    """Count equal continuations; an end token that only one side prints is ignored."""

    def cut(ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in stops else ids

    same = [cut(a) == cut(b) for a, b in zip(ours, theirs, strict=True)]
    first = [
        next((i for i, (x, y) in enumerate(zip(cut(a), cut(b), strict=False)) if x != y), None)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return {
        "prompts": len(same),
        "same": sum(same),
        "tokens": sum(map(len, ours)),
        "first_difference": {i: first[i] for i, ok in enumerate(same) if not ok},
    }


def main() -> None:
    args = arguments()
    texts = [opening + subject for opening in OPENINGS for subject in SUBJECTS]
    if args.prompts:
        texts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line]
    session = opened(args)
    stops = ends(session)
    prompts = [session.base.tokenizer(text)["input_ids"] for text in texts]
    del session
    which = ["--adapter", args.adapter, *(["--model", args.model] if args.model else [])]
    with tempfile.TemporaryDirectory() as work:
        folder, gguf, vector = Path(work) / "merged", Path(work) / "merged.gguf", Path(work) / "vector.gguf"
        braces("merge", *which, "--dtype", "float32", "--device", "cpu", "--output-dir", folder)
        convert = [args.llama_cpp / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", gguf]
        subprocess.run([sys.executable, *map(str, convert)], check=True, capture_output=True)
        with served(args, gguf) as address:
            read = [ask(address, "tokenize", {"content": text, "add_special": True})["tokens"] for text in texts]
            plain = ours(args, prompts, None)
            result = {"merged": agreement(plain, theirs(address, prompts, args.tokens, stops), stops)}
        result["merged"]["prompts_tokenised_alike"] = sum(a == b for a, b in zip(read, prompts, strict=True))
        if args.attribute:
            words = ["--attribute", args.attribute, "--s", args.s, "--layers", "1-", "--dtype", "float32"]
            braces("export", "control-vector", *which, *words, "--device", "cpu", "--output", vector)
            with served(args, gguf, ["--control-vector", vector]) as address:
                there = theirs(address, prompts, args.tokens, stops)
            steered = ours(args, prompts, args.attribute)
            result["control_vector"] = agreement(steered, there, stops)
            # Must not be 0, or the comparison is meaningless.
            result["control_vector"]["changed_by_it"] = sum(a != b for a, b in zip(plain, steered, strict=True))
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
