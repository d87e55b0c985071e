"""Every causal language model of transformers, tiny: a generic shrink of its default config, plus overrides."""

import dataclasses
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MAPPING

WIDTH, NEURONS, HEADS, KV_HEADS, HEAD, VOCABULARY, LENGTH, EXPERTS = 32, 52, 4, 2, 8, 96, 64, 4

MOST_PARAMETERS = 5_000_000

# Values of config fields, grouped by meaning. Fields that a config does not have are left out.
SHRINK: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "word_embed_proj_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), NEURONS),
    **dict.fromkeys(("d_inner", "dim_ff", "n_inner", "ffn_hidden_size", "feed_forward_size"), NEURONS),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), NEURONS),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 20),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 20),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "v_head_dim", "qk_nope_head_dim", "swa_head_dim"), HEAD),
    **dict.fromkeys(("attention_head_size", "kv_channels", "index_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_dim"), HEAD),
    # Multi-head latent attention rotates head_dim numbers by position.
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), HEAD),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank"), 16),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), LENGTH),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), LENGTH),
    **dict.fromkeys(("hidden_size_per_layer_input",), 12),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "index_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "mtp_num_layers"), 2),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "pad_token_id"), 1),
    "first_k_dense_replace": 1,
    # Mamba: the heads together are twice as wide as the model (`expand`).
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 8),
    "mamba_d_ssm": 2 * WIDTH,
    # BERT and similar models are causal only with this flag.
    "is_decoder": True,
}
# Fields that are set even if they are None in the default config, because some models do not compute them.
ALWAYS = ("head_dim", "num_key_value_heads", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts")
# Fields that hold the number of layers.
DEPTH = ("num_hidden_layers", "decoder_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_blocks")
QWEN4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 4, "hc_lowrank": 8,
}  # fmt: skip
GEMMA3N = {
    "num_hidden_layers": 6, "num_kv_shared_layers": 1, "laurel_rank": 4,
    # Both can differ between layers.
    "activation_sparsity_pattern": [0.5] + [0.0] * 5, "intermediate_size": [52, 60, 52, 52, 44, 52],
}  # fmt: skip
ASSISTANT = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": 2,
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
DOTS3 = {
    "num_key_value_heads": HEADS, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
MUSICGEN = ("musicgen", "musicgen_melody")
# Additional values of a type; nested configs are nested dictionaries.
OVERRIDES: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mlp_multipliers": [0.7, 1.3]},  # an error would not show at the default 1
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
        # The global one of its four transformers has most layers, as in the released model.
        "global_config": {"num_hidden_layers": 3},
    },
    "dots1": {"n_shared_experts": 1},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 20}},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma4_assistant": {"text_config": ASSISTANT, "backbone_hidden_size": WIDTH},
    "gemma4_unified_assistant": {"text_config": ASSISTANT, "backbone_hidden_size": WIDTH},
    "musicgen": {"decoder": {"num_codebooks": 2}},
    "musicgen_melody": {"decoder": {"num_codebooks": 2}},
    "deepseek_v2": {"topk_group": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "gemma3n_text": GEMMA3N,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": {"text_config": QWEN4},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": DOTS3,
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {
            "pyramid_num_routed": [-1, 4], "num_hidden_layers": 2, "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH,
        },
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    # Variants of a type that released models have.
    "granitemoehybrid, no experts": {"num_local_experts": 0, "layer_types": ["mamba", "attention"]},
    "nemotron_h, no experts": {"layers_block_type": ["mamba", "mlp", "attention", "mlp"], "n_groups": 2},
    "jamba, no experts": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon, new decoder": {"new_decoder_architecture": True},
    "llama, biases": {"mlp_bias": True, "attention_bias": True},
    "gemma3n_text, one width": {"num_hidden_layers": 6, "num_kv_shared_layers": 1, "laurel_rank": 4},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def depth(config: PreTrainedConfig) -> int:
    """Number of layers with one of each kind in the default config, two to eight."""
    need = 2
    for value in _per_layer(config).values():
        if len({str(kind) for kind in value}) <= 4:
            need = max(need, *(value.index(kind) + 1 for kind in value))
    return min(need, 8)


def _per_layer(config: PreTrainedConfig) -> dict[str, list]:
    """Fields with one value for each layer."""
    count = max((value for name, value in vars(config).items() if name in DEPTH), default=2)
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count > 2}


def shrink(config: PreTrainedConfig, overrides: dict[str, Any] | None = None, least: int = 2) -> dict[str, Any]:
    """Fields of a tiny config of the same class with at least `least` layers, including its sub-configs."""
    overrides = dict(overrides or {})
    known = {field.name: field for field in dataclasses.fields(config)}
    values = vars(config)
    fields = {name: value for name, value in SHRINK.items() if name in known}
    stored = {name: config.attribute_map.get(name, name) for name in fields}
    fields = {name: value for name, value in fields.items() if values.get(stored[name]) is not None or name in ALWAYS}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS  # latent attention has one key for each query head
    layers = overrides.get("num_hidden_layers", max(least, depth(config)))
    fields |= {name: layers for name in DEPTH if name in known}
    for name, value in _per_layer(config).items():
        if (
            name in known and known[name].default is not None and name not in SHRINK
        ):  # fields that default to None follow from the depth
            fields[name] = value[:layers]
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            nested = overrides.pop(name, {})
            # Towers are deeper than tiny decoders, so that a tower in the place of the decoder shows.
            fields[name] = shrink(value, nested, 8 if name in ("vision_config", "audio_config") else 2)
    return fields | overrides


VARIANTS = [name for name in OVERRIDES if ", " in name]


def model_type(name: str) -> str:
    """Type of a variant such as `jamba, no experts`."""
    return name.partition(", ")[0]


def tiny_config(name: str) -> PreTrainedConfig:
    """The tiny config of a model type or a variant."""
    kind = CONFIG_MAPPING[model_type(name)]
    # An assistant of Gemma 4 refuses the default of its per-layer embeddings.
    default = kind(text_config=CONFIG_MAPPING["gemma4_text"](**ASSISTANT)) if name == "gemma4_assistant" else kind()
    config = kind(**shrink(default, OVERRIDES.get(name)))
    # The causal model of MusicGen is its decoder; AutoModel passes it the config of the complete model.
    return config.decoder if name in MUSICGEN else config


def tiny(name: str, seed: int = 0) -> Any:
    """A tiny model of a type, in eval mode, with drawn norms and biases.

    Raises:
        ValueError, ImportError: it cannot be built.
    """
    config = tiny_config(name)
    # AutoModel does not support the config class of MusicGen's decoder.
    build = getattr(transformers, MAPPING[name])._from_config if name in MUSICGEN else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        count = sum(p.numel() for p in build(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters are too many")
    torch.manual_seed(seed)
    model = build(config, experts_implementation="eager")  # the others do not support float64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(4)  # as in tiny_model: FFN outputs are too small with the usual 0.02
    return model.eval()
