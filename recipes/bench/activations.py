"""Bytes that a training step keeps for its backward pass, counted, against a law; and what an 8B model needs by it.

Counted are the tensors that autograd saves, whatever the device, weights left out, in a bfloat16 Llama with the widths
of Llama-3-8B and few layers. The law for each token and layer, of width d, FFN width f, keys of width k, and H heads:
8 d for two norms in float32, 4 d + 4 k for queries, output, keys and values of the attention, 6 f for the gated FFN,
2 d + 2 r for an adapter of rank r, 4 H + 8 for statistics; and 12 r d + 8 r^2 + 4 r a layer, whatever the tokens.
Logits take 10 bytes each while their loss is computed. `gigabytes` are weights, adapter and optimizer, activations and
logits of a whole model with all tokens scored: calculated, without what a GPU's libraries and its allocator take.

    saved_vs_law   bytes counted for each token and layer / those of the law

python recipes/bench/activations.py
"""

from __future__ import annotations

from typing import Any

from _bench import parse, ratio, report

BIG = {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS, VOCABULARY, RANK, TOKENS = 32, 128_256, 8, 128


def law(shape: dict[str, int]) -> tuple[int, int]:
    """Bytes of a layer for each token, and of a layer whatever the tokens."""
    d, heads = shape["hidden_size"], shape["num_attention_heads"]
    keys = d // heads * shape["num_key_value_heads"]
    return 14 * d + 4 * keys + 6 * shape[
        "intermediate_size"
    ] + 2 * RANK + 4 * heads + 8, 12 * RANK * d + 8 * RANK**2 + 4 * RANK


def saved(shape: dict[str, int], layers: int) -> int:
    """Bytes that autograd saves in a forward pass of `TOKENS` tokens; storages once, parameters left out."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from braces_cli.core.adapter.model import attach

    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=512)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    attach(model, RANK)
    frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The output stays alive while bytes are counted, or the next tensor could take the place of one.
        output = model.train()(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    assert output.logits.requires_grad
    return sum(kept.values())


def gigabytes(tokens: int, checkpointing: bool) -> float:
    """Of an 8B model with an adapter in training, `tokens` a step in one pass, all of them scored."""
    d, f = BIG["hidden_size"], BIG["intermediate_size"]
    keys = d // BIG["num_attention_heads"] * BIG["num_key_value_heads"]
    weights = 2 * (LAYERS * (2 * d * d + 2 * d * keys + 3 * d * f + 2 * d) + 2 * VOCABULARY * d + d)
    # Float32 parameters, gradients and two moments.
    adapter = 16 * LAYERS * (2 * RANK * d + RANK)
    by_token, constant = law(BIG)
    # With checkpointing the input of each layer, and one layer as it is computed again.
    activations = (LAYERS * 2 * d + by_token) * tokens if checkpointing else LAYERS * (by_token * tokens + constant)
    return round((weights + adapter + activations + 10 * VOCABULARY * tokens) / 1e9, 1)


def main() -> None:
    args = parse(__doc__, 4, 7)
    shape = TINY if args.quick else BIG
    # Between two depths: what lies before the first adapter needs no backward pass.
    counted = (saved(shape, args.layers) - saved(shape, args.layers // 2)) / (args.layers - args.layers // 2) / TOKENS
    by_token, constant = law(shape)
    needs = {
        f"{tokens} tokens a step": {
            "plain": gigabytes(tokens, False), "gradient checkpointing": gigabytes(tokens, True),
        }
        for tokens in (2048, 4096, 8192, 16_384, 32_768)
    }  # fmt: skip
    settings = {
        "shape": shape, "layers": args.layers, "tokens": TOKENS, "rank": RANK, "quick": args.quick,
        "bytes_by_token_and_layer": counted, "law": by_token + constant / TOKENS, "gigabytes": needs,
    }  # fmt: skip
    report(settings, {"saved_vs_law": ratio([counted], [by_token + constant / TOKENS], None)})


if __name__ == "__main__":
    main()
