"""The Hugging Face Hub: questions, downloads, reads by byte range, and uploads."""

from moemerge.hub import download
from moemerge.hub.client import FEW_TRIES, NOWHERE, HubError
from moemerge.hub.ranges import Remote, open_remote, read_range
from moemerge.hub.repository import SHARD, Content, Repository, holds, size_of

__all__ = [
    "FEW_TRIES",
    "NOWHERE",
    "SHARD",
    "Content",
    "HubError",
    "Remote",
    "Repository",
    "download",
    "holds",
    "open_remote",
    "read_range",
    "size_of",
]
