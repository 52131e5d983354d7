"""The names that a Python program imports, as `from moemerge import merge`."""

from moemerge.config import Expert, MergeConfig, load_config, parse_config
from moemerge.costs import Transfer
from moemerge.errors import (
    InputError,
    MoemergeError,
    Problem,
    ReadError,
    RunError,
    VerifyError,
    WriteError,
)
from moemerge.evaluation import Wanted, evaluate
from moemerge.new_routers import regate
from moemerge.options import Options
from moemerge.page import render as routing_page
from moemerge.pipeline import Merged, make_plan, merge
from moemerge.plan import Plan, PlannedTensor, Shard, Source
from moemerge.prepare import Prepared
from moemerge.publish import push
from moemerge.rebuild import Built
from moemerge.reporting import Console, Reporter, Silent
from moemerge.routing import report as routing_report
from moemerge.take_apart import add, drop, extract, repair, top_k
from moemerge.training.finetune import Adapted, Lora, finetune
from moemerge.training.merge_adapter import merge_adapter
from moemerge.training.routers import Trained
from moemerge.training.tune import Tuned, tune
from moemerge.training.tune import undo as undo_tune
from moemerge.training.tuning import Tuning
from moemerge.verify import Verified, verify_checkpoint
from moemerge.version import __version__

__all__ = [
    "Adapted",
    "Built",
    "Console",
    "Expert",
    "InputError",
    "Lora",
    "MergeConfig",
    "Merged",
    "MoemergeError",
    "Options",
    "Plan",
    "PlannedTensor",
    "Prepared",
    "Problem",
    "ReadError",
    "Reporter",
    "RunError",
    "Shard",
    "Silent",
    "Source",
    "Trained",
    "Transfer",
    "Tuned",
    "Tuning",
    "Verified",
    "VerifyError",
    "Wanted",
    "WriteError",
    "__version__",
    "add",
    "drop",
    "evaluate",
    "extract",
    "finetune",
    "load_config",
    "make_plan",
    "merge",
    "merge_adapter",
    "parse_config",
    "push",
    "regate",
    "repair",
    "routing_page",
    "routing_report",
    "top_k",
    "tune",
    "undo_tune",
    "verify_checkpoint",
]
