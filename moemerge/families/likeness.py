"""The family whose models have the tensors of a mixture's body."""

from __future__ import annotations

from collections.abc import Collection

from moemerge.families.family import ATTENTION, Family
from moemerge.families.types import RECORDS


def most_like(tensors: Collection[str], windows: bool, multipliers: bool) -> Family:
    """The family with such tensors, windows and multipliers; of several, the first.

    Only families with attention in all layers count, and rope in two halves.
    """
    norm, qkv, o, after = (
        any(name.endswith(end) for name in tensors)
        for end in (
            ".q_norm.weight", ".q_proj.bias", ".o_proj.bias", ".post_feedforward_layernorm.weight"
        )
    )  # fmt: skip

    def likeness(record: Family) -> tuple[bool, ...]:  # what weighs most stands first
        biases = record.qkv_bias != record.o_bias or qkv == o
        if isinstance(record.qkv_bias, bool):
            biases = record.qkv_bias == qkv
        return (
            record.multipliers == multipliers,
            (record.qk_norm is not None) == norm,
            record.post_norm == after,
            biases,
            bool(record.window) or not windows,
        )

    known = [
        one
        for one in RECORDS.values()
        if not one.body and not one.interleaved and one.layers == ATTENTION
    ]
    return max(known, key=likeness)
