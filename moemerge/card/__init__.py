"""The model card: written, checked for edits, and what of a config may be shared."""

from moemerge.card import card, files
from moemerge.card.evaluation import cells, metric_of, without_evaluation
from moemerge.card.exported import card_of_file
from moemerge.card.files import tell_evaluation
from moemerge.card.sharing import shareable
from moemerge.card.text import CardOptions

__all__ = [
    "CardOptions",
    "card",
    "card_of_file",
    "cells",
    "files",
    "metric_of",
    "shareable",
    "tell_evaluation",
    "without_evaluation",
]
