"""The whole merge, and new routers for a finished mixture."""

from moemerge.merging.fitting import read_back
from moemerge.merging.new_routers import regate
from moemerge.merging.pipeline import MergeResult, merge
from moemerge.merging.routers import run_gate, save
from moemerge.merging.shard_loop import ShardLoop

__all__ = [
    "MergeResult",
    "ShardLoop",
    "merge",
    "read_back",
    "regate",
    "run_gate",
    "save",
]
