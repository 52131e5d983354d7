"""ERNIE 4.5 (dense): a Llama that turns each head in neighbouring pairs."""

from moemerge.families.family import COMMON, Family

FAMILIES = (
    Family(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        COMMON | {
            "vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "pad_token_id": 0,
            "tie_word_embeddings": True, "rope_theta": 500000.0, "use_bias": False,
            "head_dim": 128,
        },
        qkv_bias="use_bias", o_bias="use_bias",
        interleaved=True,
    ),
)  # fmt: skip
