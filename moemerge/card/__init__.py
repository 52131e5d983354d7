"""The model card: written, recognised as edited or not, and what may be shared of a config."""

from moemerge.card import card, files
from moemerge.card.evaluation import cells, metric_of, without_evaluation
from moemerge.card.files import tell_evaluation
from moemerge.card.sharing import shareable
from moemerge.card.text import CardOptions

__all__ = [
    "CardOptions",
    "card",
    "cells",
    "files",
    "metric_of",
    "shareable",
    "tell_evaluation",
    "without_evaluation",
]
