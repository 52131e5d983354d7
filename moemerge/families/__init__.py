"""Dense model families: the defaults of config.json, and the names and shapes of tensors."""

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
