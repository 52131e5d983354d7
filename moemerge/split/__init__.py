"""One model's MLPs cut into slices."""

from typing import TYPE_CHECKING

from moemerge.split.config import Split, check, of_config, with_slices
from moemerge.split.neurons import chosen_slices
from moemerge.split.slices import Cutter, Cutting, read_text

if TYPE_CHECKING:
    from moemerge.split.neurons import Order

__all__ = [
    "Cutter",
    "Cutting",
    "Order",
    "Split",
    "check",
    "chosen_slices",
    "of_config",
    "read_text",
    "with_slices",
]
