"""Dense model families: what a config.json leaves out, and how its tensors are called."""

from moemerge.families.dense_config import normalise
from moemerge.families.names import DOWN, EMBEDDING, GATE, HEAD, LAYER, UP, dense
from moemerge.families.records import RECORDS, Family, most_like
from moemerge.families.rope import PARTIAL, TRAINED

__all__ = [
    "DOWN",
    "EMBEDDING",
    "GATE",
    "HEAD",
    "LAYER",
    "PARTIAL",
    "RECORDS",
    "TRAINED",
    "UP",
    "Family",
    "dense",
    "most_like",
    "normalise",
]
