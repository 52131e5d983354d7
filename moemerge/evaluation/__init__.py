"""How good a mixture is and how it routes, beside its sources."""

from moemerge.evaluation.loss import router_logits
from moemerge.evaluation.routing import report
from moemerge.evaluation.run import EvalSpec, evaluate

__all__ = [
    "EvalSpec",
    "evaluate",
    "report",
    "router_logits",
]
