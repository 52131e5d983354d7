"""Granite 3: a Llama with multipliers."""

from moemerge.families.family import COMMON, Family

FAMILIES = (
    Family(
        "granite",
        "GraniteForCausalLM",
        COMMON | {
            "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        multipliers=True,
    ),
)  # fmt: skip
