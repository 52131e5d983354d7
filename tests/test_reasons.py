"""Each reason for which a family is refused, held to transformers' code: the words that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from moemerge.families import NO_HOST

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")

NO_GATE = "self.down_proj(self.act_fn(self.up_proj(x)))"
SAYS: dict[str, tuple[str, ...]] = {
    "gemma": ("(1.0 + self.weight", "self.embed_scale"),
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": ("self.q_norm = ", "self.k_norm = "),
    "gemma3_text": ("self.q_norm = ", "self.k_norm = "),
    "glm4": ("self.post_self_attn_layernorm = ", "self.post_mlp_layernorm = "),
    "exaone4": ("self.post_attention_layernorm = ", "self.post_feedforward_layernorm = "),
    "olmo": ("class OlmoLayerNorm", "None, None, eps"),
    "phi": ("feed_forward_hidden_states + residual", "bias=True"),
    "phimoe": ("sparsemixer",),
    "gpt2": ("self.c_fc = ", "self.wpe = "),
    "gpt_neox": ("self.dense_h_to_4h = ",),
    "falcon": ("self.dense_h_to_4h = ",),
    "starcoder2": ("self.c_fc = ",),
    "apertus": (NO_GATE,),
    "arcee": (NO_GATE,),
    "stablelm": ("self.input_layernorm = nn.LayerNorm",),
    "cohere": ("residual + hidden_states_attention + hidden_states_mlp",),
    "deepseek_v2": ("self.kv_a_proj_with_mqa = ", "self.experts = "),
    "deepseek_v3": ("self.kv_a_proj_with_mqa = ", "self.experts = "),
    "minicpm3": ("self.kv_a_proj_with_mqa = ",),
    "bloom": ("build_alibi_tensor", "self.dense_h_to_4h = "),
    "mpt": ("build_mpt_alibi_tensor", "self.up_proj = "),
    "opt": ("self.embed_positions = ", "self.fc1 = "),
    "gptj": ("attn_outputs + feed_forward_hidden_states + residual", "self.fc_in = "),
    "gpt_bigcode": ("self.wpe = ", "self.c_fc = "),
    "nemotron": (NO_GATE,),
    "mamba": ("class MambaMixer",),
    "mamba2": ("class Mamba2Mixer",),
}
LACKS: dict[str, str] = {
    "gemma3": "self.v_norm = ", "gemma3_text": "self.v_norm = ", "exaone4": "self.input_layernorm",
    "cohere": "sliding_window", "phi": "gate_proj", "gpt2": "gate_proj", "gpt_neox": "gate_proj",
    "falcon": "gate_proj", "starcoder2": "gate_proj", "apertus": "gate_proj", "arcee": "gate_proj",
    "bloom": "gate_proj", "mpt": "gate_proj", "opt": "gate_proj", "gptj": "gate_proj",
    "gpt_bigcode": "gate_proj", "nemotron": "gate_proj", "mamba": "MLP(", "mamba2": "MLP(",
}  # fmt: skip
"""What a family's code does not have, if that is the reason."""
HOSTS = {
    "gemma3": ("gemma4", "self.v_norm = "),
    "exaone4": ("exaone_moe", "self.input_layernorm = "),
    "glm4": ("glm4_moe", "self.post_attention_layernorm = "),
}
"""What the nearest class has instead."""


def code(family: str) -> str:
    models, name = Path(transformers.__file__).parent / "models", family.removesuffix("_text")
    return (models / name / f"modeling_{name}.py").read_text(encoding="utf-8")


def test_every_reason_is_held() -> None:
    assert SAYS.keys() == NO_HOST.keys()


@pytest.mark.parametrize("family", SAYS)
def test_transformers_says_what_the_reason_says(family: str) -> None:
    text = code(family)
    for words in SAYS[family]:
        assert words in text, words
    if family in LACKS:
        assert LACKS[family] not in text
    if family in HOSTS:
        host, words = HOSTS[family]
        assert words in code(host)
