"""Output architectures: the slots of each class, and what a class cannot hold."""

from moemerge.architectures.limits import Holds
from moemerge.architectures.reading import LAYER, MLP, SEGMENTS, SPLIT_FACTOR, Names, Reading
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
from moemerge.architectures.types import (
    COUNTS,
    ROUTING,
    Architecture,
    count_of,
    find,
    names,
    reading_of,
)

__all__ = [
    "COUNTS",
    "LAYER",
    "MLP",
    "ROUTING",
    "SEGMENTS",
    "SPLIT_FACTOR",
    "Architecture",
    "Constant",
    "FromBody",
    "FromExpert",
    "Holds",
    "Joined",
    "Made",
    "Mixture",
    "Names",
    "Reading",
    "Slot",
    "count_of",
    "dense_shapes",
    "find",
    "names",
    "reading_of",
]
