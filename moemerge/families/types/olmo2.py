"""OLMo 2: norms after attention and MLP, and over the full width of queries and keys."""

from moemerge.families.family import COMMON, Family

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    COMMON | {
        "vocab_size": 50304, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279,
        "rms_norm_eps": 1e-5,
    },
    qk_norm="full", post_norm=True,
)  # fmt: skip
FAMILIES = (OLMO2,)
