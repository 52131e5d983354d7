"""Reports for people to look at: the page of a routing report, and the heat map of routers."""

from moemerge.report import heat_map, page
from moemerge.report.data import (
    Collision,
    Evaluation,
    EvaluationRow,
    FitSummary,
    FittedExpert,
    PassageRouting,
    RoutingPicture,
    RoutingReport,
    RoutingSummary,
    TextRouting,
)
from moemerge.report.fitted import fit_lines
from moemerge.report.page import render

__all__ = [
    "Collision",
    "Evaluation",
    "EvaluationRow",
    "FitSummary",
    "FittedExpert",
    "PassageRouting",
    "RoutingPicture",
    "RoutingReport",
    "RoutingSummary",
    "TextRouting",
    "fit_lines",
    "heat_map",
    "page",
    "render",
]
