"""How good a mixture is and how it routes, beside its sources."""

from moemerge.evaluation.routing import report
from moemerge.evaluation.run import Wanted, evaluate

__all__ = [
    "Wanted",
    "evaluate",
    "report",
]
