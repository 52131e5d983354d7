"""Families that no mixture class computes exactly, with the reason."""

from __future__ import annotations

NO_HOST = {
    "gemma": "its norms add one to their weights and its embeddings are scaled",
    "gemma2": "it softcaps the scores of attention and the logits, which no mixture class does",
    "gemma3": "it norms queries and keys but not values, and the gemma4 class values too",
    "gemma3_text": "it norms queries and keys but not values, and the gemma4 class values too",
    "glm4": "it has norms before and after each part, and glm4_moe before alone",
    "exaone4": "its norms are after each part, and exaone_moe's are before",
    "olmo": "its norms have no weights",
    "phi": "its attention and MLP are parallel, with biases",
    "phimoe": "it is a mixture already, whose routing weights do not sum to 1",
    "gpt2": "its MLPs have no gate, and positions are learnt",
    "gpt_neox": "its MLPs have no gate",
    "falcon": "its MLPs have no gate",
    "starcoder2": "its MLPs have no gate",
    "apertus": "its MLPs have no gate",
    "arcee": "its MLPs have no gate",
    "stablelm": "its norms have biases",
    "cohere": "its attention and MLP are parallel, without the windows of a Cohere 2",
    "deepseek_v2": "it is a mixture already, with latent attention",
    "deepseek_v3": "it is a mixture already, with latent attention",
    "minicpm3": "its attention is latent",
    "bloom": "its MLPs have no gate, and its attention has a bias by distance",
    "mpt": "its MLPs have no gate, and its attention has a bias by distance",
    "opt": "its MLPs have no gate, and positions are learnt",
    "gptj": "its attention and MLP are parallel, and its MLPs have no gate",
    "gpt_bigcode": "its MLPs have no gate, and positions are learnt",
    "nemotron": "its MLPs have no gate",
    "mamba": "it has no MLPs",
    "mamba2": "it has no MLPs",
}
"""By model_type. `tests/test_reasons.py` holds each to transformers' code."""
