"""What people look at: the page of a routing report, and the picture of router strengths."""

from moemerge.report import heat_map, page
from moemerge.report.page import render

__all__ = [
    "heat_map",
    "page",
    "render",
]
