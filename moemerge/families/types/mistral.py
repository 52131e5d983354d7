"""Mistral: a Llama without biases, with a window."""

from moemerge.families.family import COMMON, Family

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    COMMON | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    qkv_bias=False, o_bias=False, window="all",
)  # fmt: skip
FAMILIES = (MISTRAL,)
