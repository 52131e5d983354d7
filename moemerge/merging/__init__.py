"""The whole merge, new routers for a finished mixture, and its export as a GGUF file."""

from moemerge.merging.export import Exported, export
from moemerge.merging.new_routers import regate
from moemerge.merging.pipeline import MergeResult, merge
from moemerge.merging.routers import run_gate, save

__all__ = [
    "Exported",
    "MergeResult",
    "export",
    "merge",
    "regate",
    "run_gate",
    "save",
]
