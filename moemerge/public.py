"""The names that a Python program imports, as `from moemerge import merge`."""

from moemerge.config import Expert, MergeConfig, Picture, load_config, parse_config
from moemerge.errors import (
    InputError,
    MoemergeError,
    Problem,
    ReadError,
    RunError,
    VerifyError,
    WriteError,
)
from moemerge.evaluation import EvalSpec, evaluate
from moemerge.evaluation import report as routing_report
from moemerge.gguf import Exported, export
from moemerge.merging import MergeResult, merge, regate
from moemerge.mixture import EditResult, add, drop, extract, repair, top_k
from moemerge.options import Options
from moemerge.output import Verified, verify_checkpoint
from moemerge.plan import Head, Plan, PlannedTensor, Shard, Source
from moemerge.prepare import Prepared, Transfer, check_family, make_plan
from moemerge.publish import push
from moemerge.report import (
    Collision,
    Evaluation,
    EvaluationRow,
    FitSummary,
    FittedExpert,
    PassageRouting,
    RoutingReport,
    RoutingSummary,
    TextRouting,
)
from moemerge.report import render as routing_page
from moemerge.reporting import Console, Reporter, Silent
from moemerge.training import Adapted, Lora, Trained, Tuned, Tuning, finetune, merge_adapter, tune
from moemerge.training import undo as undo_tune
from moemerge.version import __version__

Built = EditResult
"""The old name of `EditResult`."""

Merged = MergeResult
"""The old name of `MergeResult`."""

Wanted = EvalSpec
"""The old name of `EvalSpec`."""

__all__ = [
    "Adapted",
    "Built",
    "Collision",
    "Console",
    "EditResult",
    "EvalSpec",
    "Evaluation",
    "EvaluationRow",
    "Expert",
    "Exported",
    "FitSummary",
    "FittedExpert",
    "Head",
    "InputError",
    "Lora",
    "MergeConfig",
    "MergeResult",
    "Merged",
    "MoemergeError",
    "Options",
    "PassageRouting",
    "Picture",
    "Plan",
    "PlannedTensor",
    "Prepared",
    "Problem",
    "ReadError",
    "Reporter",
    "RoutingReport",
    "RoutingSummary",
    "RunError",
    "Shard",
    "Silent",
    "Source",
    "TextRouting",
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
    "check_family",
    "drop",
    "evaluate",
    "export",
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
