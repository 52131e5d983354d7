"""Qwen 2 and 2.5, with biases on queries, keys and values; Qwen 3, with norms of them."""

from moemerge.families.family import COMMON, Family

_QWEN = COMMON | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip

FAMILIES = (
    Family("qwen2", "Qwen2ForCausalLM", _QWEN, qkv_bias=True, o_bias=False, window="counted"),
    Family(
        "qwen3", "Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, qk_norm="head", window="counted"
    ),
)
