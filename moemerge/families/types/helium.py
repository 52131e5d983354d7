"""Helium: a Llama that turns each head in neighbouring pairs."""

from moemerge.families.family import COMMON, Family

FAMILIES = (
    Family(
        "helium",
        "HeliumForCausalLM",
        COMMON | {
            "vocab_size": 48000, "hidden_size": 2560, "intermediate_size": 7040,
            "num_hidden_layers": 24, "num_attention_heads": 20, "num_key_value_heads": 20,
            "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-8,
            "pad_token_id": 3, "rope_theta": 100_000.0,
        },
        o_bias=False,
        interleaved=True,
    ),
)  # fmt: skip
