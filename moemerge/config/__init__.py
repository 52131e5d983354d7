"""The YAML config: read to dataclasses, with the line of every problem."""

from moemerge.config.check import check_values
from moemerge.config.schema import Expert, MergeConfig, load_config, parse_config
from moemerge.config.settings import held

__all__ = [
    "Expert",
    "MergeConfig",
    "check_values",
    "held",
    "load_config",
    "parse_config",
]
