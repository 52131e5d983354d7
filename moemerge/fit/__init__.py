"""Bodies and experts fitted to texts, layer by layer: RegMean and alignment."""

from moemerge.fit.passes import FitReport, run_fit
from moemerge.fit.setup import fit_of
from moemerge.fit.targets import Fit, as_written, with_written

__all__ = [
    "Fit",
    "FitReport",
    "as_written",
    "fit_of",
    "run_fit",
    "with_written",
]
