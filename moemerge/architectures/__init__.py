"""What can be written: slots of an output class, and what a class cannot hold."""

from moemerge.architectures.expert_names import (
    COUNTS,
    LAYER,
    MLP,
    SEGMENTS,
    SPLIT_FACTOR,
    Names,
    count_of,
    names_of,
)
from moemerge.architectures.slots import (
    Constant,
    FromBody,
    FromExpert,
    Joined,
    Made,
    Mixture,
    Slot,
    dense_shapes,
)
from moemerge.architectures.types import Architecture, find, names

__all__ = [
    "COUNTS",
    "LAYER",
    "MLP",
    "SEGMENTS",
    "SPLIT_FACTOR",
    "Architecture",
    "Constant",
    "FromBody",
    "FromExpert",
    "Joined",
    "Made",
    "Mixture",
    "Names",
    "Slot",
    "count_of",
    "dense_shapes",
    "find",
    "names",
    "names_of",
]
