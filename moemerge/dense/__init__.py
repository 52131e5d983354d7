"""Dense models run in transformers: router inputs layer by layer, whole models, written text."""

from moemerge.dense.body import VOCABULARY, Body
from moemerge.dense.entering import Passage, embed
from moemerge.dense.generate import write_texts
from moemerge.dense.inputs import layer_inputs, router_inputs
from moemerge.dense.lane import ROUTER, Lane
from moemerge.dense.probe import differs_by
from moemerge.dense.run import (
    Streamed,
    available_memory,
    compute_dtype,
    make_buffers,
    model_bytes,
    pick_device,
    place_buffers,
    whole_model,
)

__all__ = [
    "ROUTER",
    "VOCABULARY",
    "Body",
    "Lane",
    "Passage",
    "Streamed",
    "available_memory",
    "compute_dtype",
    "differs_by",
    "embed",
    "layer_inputs",
    "make_buffers",
    "model_bytes",
    "pick_device",
    "place_buffers",
    "router_inputs",
    "whole_model",
    "write_texts",
]
