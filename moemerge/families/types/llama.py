"""Llama, and families that are a Llama under another name."""

from moemerge.families.family import Family

LLAMA = Family("llama", "LlamaForCausalLM")
FAMILIES = (LLAMA,)
