"""Logits of a checkpoint in plain transformers, with LoRA files through peft; braces cannot be imported here.

    python -I verify_process.py FOLDER REQUEST ANSWER

REQUEST is JSON, `{texts, ids, device, dtype, code, loras}`. ANSWER is written: a safetensors file with the logits of
`ids`, whose header holds the loading report and the tokens of `texts`.
"""

import importlib.abc
import json
import sys
from typing import Any


class _NoBraces(importlib.abc.MetaPathFinder):
    """Fail on any import of braces, installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "braces_cli":
            raise ImportError("braces_cli cannot be imported here")


def probe(folder: str, request: str, answer: str) -> None:
    """Load the checkpoint in `folder` and write the answer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(request, encoding="utf-8") as file:
        question = json.load(file)
    options = {"dtype": question["dtype"], "adapter_kwargs": {"subfolder": "no-adapter"}}  # see `core.models.hub`
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=question["code"], **options
    )
    model, info = loaded
    model.eval().to(question["device"])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    header = {
        "keys": {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "ids": [tokenizer(text)["input_ids"] for text in question["texts"]],
    }
    if question["loras"]:
        from peft import PeftModel

        first, *others = question["loras"]
        wrapped: Any = PeftModel.from_pretrained(model, first, adapter_name="lora0")
        for index, lora in enumerate(others, start=1):
            wrapped.load_adapter(lora, adapter_name=f"lora{index}")
        wrapped.base_model.set_adapter(list(wrapped.peft_config))
        model = wrapped.eval()
    with torch.no_grad():
        batch = torch.tensor(question["ids"], device=question["device"])
        logits = model(input_ids=batch, use_cache=False).logits.float().cpu()
    save_file({"logits": logits}, answer, metadata={"probe": json.dumps(header)})


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoBraces())
    try:
        import braces_cli  # noqa: F401
    except ImportError:
        probe(*sys.argv[1:])
    else:
        sys.exit("braces_cli can be imported here, so the verification would prove nothing")
