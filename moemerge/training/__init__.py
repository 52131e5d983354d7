"""Routers trained in place, and a LoRA over all linears and experts."""

from moemerge.training.lora import Adapted, Lora, finetune, is_first_process
from moemerge.training.merge_lora import merge_adapter
from moemerge.training.router_loop import Trained, shape
from moemerge.training.settings import Tuning
from moemerge.training.tune_routers import Tuned, tune, undo

__all__ = [
    "Adapted",
    "Lora",
    "Trained",
    "Tuned",
    "Tuning",
    "finetune",
    "is_first_process",
    "merge_adapter",
    "shape",
    "tune",
    "undo",
]
