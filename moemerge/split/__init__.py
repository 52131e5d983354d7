"""One dense model's MLPs cut into slices, which become the experts."""

from typing import TYPE_CHECKING

from moemerge.split.config import Split, check_split, split_of, with_slices
from moemerge.split.neurons import chosen_slices
from moemerge.split.slices import Cutter, Cutting, read_text

if TYPE_CHECKING:
    from moemerge.split.neurons import Order

__all__ = [
    "Cutter",
    "Cutting",
    "Order",
    "Split",
    "check_split",
    "chosen_slices",
    "read_text",
    "split_of",
    "with_slices",
]
