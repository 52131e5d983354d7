"""GLM-4-9B: a Llama that turns the first half of each head, in neighbouring pairs."""

from moemerge.families.family import COMMON, Family

FAMILIES = (
    Family(
        "glm",
        "GlmForCausalLM",
        COMMON | {
            "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
            "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-07, "pad_token_id": 151329, "bos_token_id": None,
            "eos_token_id": [151329, 151336, 151338], "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        o_bias=False,
        interleaved=True,
        turns_in_part=True,
        fused={"mlp.gate_up_proj": {"mlp.gate_proj": "", "mlp.up_proj": ""}},
    ),
)  # fmt: skip
