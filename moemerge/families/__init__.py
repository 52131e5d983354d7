"""Dense model families: what a config.json leaves out, and how its tensors are called."""

from moemerge.families.dense_config import DEFAULTS, normalise
from moemerge.families.names import DOWN, EMBEDDING, GATE, HEAD, LAYER, UP, dense
from moemerge.families.rope import PARTIAL, TRAINED

__all__ = [
    "DEFAULTS",
    "DOWN",
    "EMBEDDING",
    "GATE",
    "HEAD",
    "LAYER",
    "PARTIAL",
    "TRAINED",
    "UP",
    "dense",
    "normalise",
]
