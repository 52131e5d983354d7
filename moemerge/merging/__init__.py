"""The whole merge, and new routers for a finished mixture."""

from moemerge.merging.new_routers import regate
from moemerge.merging.pipeline import MergeResult, merge
from moemerge.merging.routers import run_gate, save

__all__ = [
    "MergeResult",
    "merge",
    "regate",
    "run_gate",
    "save",
]
