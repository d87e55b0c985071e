"""Count the bytes that a training step keeps for its backward pass, and calculate the memory that an 8B model needs.

Counted are the tensors that autograd saves, without weights, in a bfloat16 Llama with the widths of Llama-3-8B and few
layers. Calculated per token and layer, of width d, FFN width f, keys of width k, and H heads: 8 d for two norms in
float32, 4 d + 4 k for queries, output, keys and values of the attention, 6 f for the gated FFN, 2 d + 2 r for an
adapter of rank r, 4 H + 8 for statistics; and bytes of the adapter's factors per layer. Logits take 10 bytes each while
their loss is computed. `gigabytes` are weights, adapter and optimizer, activations and logits of the complete model
with all tokens scored, without the memory of a GPU's libraries and allocator.

    saved_vs_calculated   bytes counted / bytes calculated, per token and layer

python recipes/bench/activations.py
"""

from __future__ import annotations

from typing import Any

from common import RANK, parse, ratio, report

BIG = {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS, VOCABULARY, TOKENS = 32, 128_256, 128


def calculated(shape: dict[str, int]) -> int:
    """Return the bytes per token and layer, without the adapter's factors."""
    d, f, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    return 14 * d + 4 * (d // heads) * shape["num_key_value_heads"] + 6 * f + 2 * RANK + 4 * heads + 8


def saved(shape: dict[str, int], layers: int, tokens: int) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage once, without parameters."""
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
        # The output must stay alive, or another tensor could reuse the address of a counted one.
        output = model.train()(input_ids=torch.arange(tokens)[None], use_cache=False)
    assert output.logits.requires_grad
    return sum(kept.values())


def gigabytes(tokens: int, checkpointing: bool) -> float:
    """Return the memory of an 8B model with an adapter in training, `tokens` per step, all scored."""
    d, f = BIG["hidden_size"], BIG["intermediate_size"]
    keys = d // BIG["num_attention_heads"] * BIG["num_key_value_heads"]
    weights = 2 * (LAYERS * (2 * d * d + 2 * d * keys + 3 * d * f + 2 * d) + 2 * VOCABULARY * d + d)
    # Float32 parameters, gradients and two moments; and the cached products W_V W_V^T, of which 5/8 are stored.
    adapter = LAYERS * (16 * (RANK * d + 1) + 4 * d * d * 5 // 8)
    # With checkpointing: the input of each layer, and one recomputed layer.
    activations = (LAYERS * 2 * d + calculated(BIG) if checkpointing else LAYERS * calculated(BIG)) * tokens
    return round((weights + adapter + activations + 10 * VOCABULARY * tokens) / 1e9, 1)


def main() -> None:
    args = parse(__doc__, 4, 7)
    shape = TINY if args.quick else BIG
    layers = 4 if args.quick else args.shape.layers
    # Differences of depths and of token counts: the first layer keeps less, tables of positions are shared by the
    # others, and factors do not depend on tokens.
    many, few = (saved(shape, layers, n) - saved(shape, layers // 2, n) for n in (2 * TOKENS, TOKENS))
    counted = (many - few) / (layers - layers // 2) / TOKENS
    settings = {
        "shape": shape, "layers": layers, "tokens": TOKENS, "rank": RANK, "quick": args.quick,
        "bytes_per_token_and_layer": counted, "calculated": calculated(shape),
        "gigabytes": {
            f"{n} tokens": {"plain": gigabytes(n, False), "gradient checkpointing": gigabytes(n, True)}
            for n in (2048, 4096, 8192, 16_384, 32_768)
        },
    }  # fmt: skip
    report(settings, {"saved_vs_calculated": ratio([counted], [calculated(shape)], None)})


if __name__ == "__main__":
    main()
