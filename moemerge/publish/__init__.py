"""A finished output, or each shard as it is written, to the Hub."""

from moemerge.publish.permission import refusals
from moemerge.publish.shipment import Shipment
from moemerge.publish.upload import push

__all__ = [
    "Shipment",
    "push",
    "refusals",
]
