"""Upload to the Hub: a finished output, or each shard as soon as it is written."""

from moemerge.publish.permission import refusals
from moemerge.publish.shipment import Shipment
from moemerge.publish.upload import push

__all__ = [
    "Shipment",
    "push",
    "refusals",
]
