"""A finished mixture written as a GGUF file."""

from moemerge.gguf.from_mixture import Exported, export

__all__ = ["Exported", "export"]
