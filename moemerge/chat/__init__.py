"""A word with a mixture: streamed answers, and which expert spoke."""

from moemerge.chat.answers import Answers, Asked, Piece, spoken
from moemerge.chat.speakers import open_speaker

__all__ = ["Answers", "Asked", "Piece", "open_speaker", "spoken"]
