"""A mixture that is there: opened, loaded, edited, repaired, and taken apart."""

from moemerge.mixture.edit import add, drop, opened_mixture, top_k
from moemerge.mixture.edited_plan import Edit
from moemerge.mixture.extraction import extract
from moemerge.mixture.linear_experts import experts_of
from moemerge.mixture.loading import config_of, encoder_of, load_mixture
from moemerge.mixture.open import Moe, open_moe, portions
from moemerge.mixture.parts import Part
from moemerge.mixture.rebuild import EditResult, build
from moemerge.mixture.repairing import repair
from moemerge.mixture.unfused import (
    check_memory,
    dtype_of,
    is_plain,
    load,
    name_in_files,
    routers_of,
)

__all__ = [
    "Edit",
    "EditResult",
    "Moe",
    "Part",
    "add",
    "build",
    "check_memory",
    "config_of",
    "drop",
    "dtype_of",
    "encoder_of",
    "experts_of",
    "extract",
    "is_plain",
    "load",
    "load_mixture",
    "name_in_files",
    "open_moe",
    "opened_mixture",
    "portions",
    "repair",
    "routers_of",
    "top_k",
]
