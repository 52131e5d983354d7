"""The YAML config, read into dataclasses; every problem has its line."""

from moemerge.config.check import check_values
from moemerge.config.schema import Expert, MergeConfig, as_config, load_config, parse_config
from moemerge.config.settings import option_types, read_options, read_settings
from moemerge.config.values import Picture, PromptText

__all__ = [
    "Expert",
    "MergeConfig",
    "Picture",
    "PromptText",
    "as_config",
    "check_values",
    "load_config",
    "option_types",
    "parse_config",
    "read_options",
    "read_settings",
]
