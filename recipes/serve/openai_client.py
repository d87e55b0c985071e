"""Request continuations from the base and each LoRA of a vLLM or SGLang server. NOT TESTED on either server.

Both servers apply one LoRA per request, at the scale in its file: adapter and attribute are one LoRA per strength.

    braces export slots --model M --output-dir slots
    braces export lora --base slots --adapter A --output-dir plain
    braces export lora --base slots --adapter A --attribute positive --s 3 --combine --output-dir up
    braces export lora --base slots --adapter A --attribute positive --s -2 --combine --output-dir down

vLLM (rank 16 and one attribute are rank 17; the next rank that vLLM accepts is 32):

    vllm serve slots --enable-lora --max-loras 3 --max-lora-rank 32 --lora-modules plain=plain up=up down=down
    python recipes/serve/openai_client.py --address http://127.0.0.1:8000 --prompt "The film was" slots plain up down

SGLang: slots need biases in the feed-forward layers, which its Llama does not have, so its transformers backend is
used. Whether LoRA works with that backend depends on the version. A LoRA is named BASE:LORA:

    python -m sglang.launch_server --model-path slots --model-impl transformers --enable-lora \
        --lora-paths plain=plain up=up down=down --max-loras-per-batch 3 --port 8000
    python recipes/serve/openai_client.py --prompt "The film was" slots slots:plain slots:up slots:down

A checkpoint with its modelling file (`braces export code`) needs no LoRA; vLLM's transformers backend loads it:

    vllm serve code --trust-remote-code --model-impl transformers
    python recipes/serve/openai_client.py --prompt "The film was" code
"""

from __future__ import annotations

import argparse
import json
import urllib.request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of the base and its LoRA files on the server")
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    for prompt in args.prompt:
        for model in args.models:
            body = {"model": model, "prompt": prompt, "max_tokens": args.tokens, "temperature": 0}
            request = urllib.request.Request(
                f"{args.address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=600) as reply:
                text = json.load(reply)["choices"][0]["text"]
            print(json.dumps({"model": model, "text": prompt + text}, ensure_ascii=False))


if __name__ == "__main__":
    main()
