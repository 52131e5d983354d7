"""Dense model families: the defaults of config.json, and the names and shapes of tensors."""

from moemerge.families.dense_config import normalise
from moemerge.families.family import ATTENTION, Family
from moemerge.families.likeness import most_like
from moemerge.families.names import DOWN, EMBEDDING, GATE, HEAD, LAYER, NORM, TEXT_PREFIX, UP, dense
from moemerge.families.no_host import NO_HOST
from moemerge.families.rope import PARTIAL, TRAINED
from moemerge.families.tensors import one_width
from moemerge.families.types import RECORDS, record_of

__all__ = [
    "ATTENTION",
    "DOWN",
    "EMBEDDING",
    "GATE",
    "HEAD",
    "LAYER",
    "NORM",
    "NO_HOST",
    "PARTIAL",
    "RECORDS",
    "TEXT_PREFIX",
    "TRAINED",
    "UP",
    "Family",
    "dense",
    "most_like",
    "normalise",
    "one_width",
    "record_of",
]
