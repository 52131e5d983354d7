"""From a config to a plan: opens sources, chooses an architecture, lays out tensors, sums costs."""

from moemerge.prepare.choose import caveats, listing, no_host
from moemerge.prepare.compatibility import compare
from moemerge.prepare.costs import Transfer, check_cache_room, expected_peak, transfer
from moemerge.prepare.gguf.layout import Content, host_of, planned
from moemerge.prepare.gguf.tensors import (
    Wanted,
    body_tensors,
    expert_tensors,
    made_name,
    shared_tensor,
)
from moemerge.prepare.layout import source_of
from moemerge.prepare.likely_family import check_family
from moemerge.prepare.records import Prepared
from moemerge.prepare.source_cards import Claims, claims_of, split_own
from moemerge.prepare.sources import Tensors, fetch
from moemerge.prepare.stages import make_plan, prepare

__all__ = [
    "Claims",
    "Content",
    "Prepared",
    "Tensors",
    "Transfer",
    "Wanted",
    "body_tensors",
    "caveats",
    "check_cache_room",
    "check_family",
    "claims_of",
    "compare",
    "expected_peak",
    "expert_tensors",
    "fetch",
    "host_of",
    "listing",
    "made_name",
    "make_plan",
    "no_host",
    "planned",
    "prepare",
    "shared_tensor",
    "source_of",
    "split_own",
    "transfer",
]
