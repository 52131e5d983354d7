"""Router initialisation: the gate modes, their inputs, and measures of how well routers route."""

from typing import TYPE_CHECKING

from moemerge.gates import load_balance, modes, setup, statistics
from moemerge.gates.kept import Keeper, kept_in, texts_in, with_expert
from moemerge.gates.needs import Needs, Prompts
from moemerge.gates.prompts import ExpertPrompts
from moemerge.gates.setup import Gate, check_device_is_here, planned_texts
from moemerge.gates.statistics import Routed, verdict
from moemerge.gates.task import Routers, Task

if TYPE_CHECKING:
    from moemerge.gates.task import Matrix

__all__ = [
    "ExpertPrompts",
    "Gate",
    "Keeper",
    "Matrix",
    "Needs",
    "Prompts",
    "Routed",
    "Routers",
    "Task",
    "check_device_is_here",
    "kept_in",
    "load_balance",
    "modes",
    "planned_texts",
    "setup",
    "statistics",
    "texts_in",
    "verdict",
    "with_expert",
]
