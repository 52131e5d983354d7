"""Phi-3 and Phi-4: a Mistral with fused projections; Phi-4-mini turns a part of each head."""

from moemerge.families.types.mistral import MISTRAL

FAMILIES = (
    MISTRAL.saved_as(
        "phi3",
        {
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "num_key_value_heads": None, "rms_norm_eps": 1e-5, "sliding_window": None,
            "eos_token_id": 32000, "pad_token_id": 32000,
        },
        reads_layer_types=False,
        ropes=("default", "longrope"),
        rope_names={"yarn": "longrope"},
        turns_in_part=True,
        fused={
            "self_attn.qkv_proj": {
                "self_attn.q_proj": "num_attention_heads",
                "self_attn.k_proj": "num_key_value_heads",
                "self_attn.v_proj": "num_key_value_heads",
            },
            "mlp.gate_up_proj": {"mlp.gate_proj": "", "mlp.up_proj": ""},
        },
    ),
)  # fmt: skip
