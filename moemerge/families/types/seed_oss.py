"""Seed-OSS: a Llama with biases on queries, keys and values."""

from moemerge.families.family import COMMON, Family

FAMILIES = (
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        COMMON | {
            "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 80, "num_key_value_heads": 8,
            "max_position_embeddings": 524288, "pad_token_id": 1, "bos_token_id": 0,
            "attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1,
            "residual_dropout": 0.1, "head_dim": 128,
        },
        o_bias="attention_out_bias",
    ),
)  # fmt: skip
