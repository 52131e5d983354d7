"""The output directory: shards, manifest, resuming, and a check of what was written."""

from moemerge.output.carried import (
    TOKENIZER_FILES,
    carried_content,
    carried_files,
    check_carried,
)
from moemerge.output.change import Change, held, settle
from moemerge.output.directory import (
    begin,
    check,
    file_names,
    is_finished,
    writing,
)
from moemerge.output.disk import CHUNK_BYTES, OutputFile, takes_direct
from moemerge.output.finished import (
    changed_sources,
    check_shards,
    check_sources,
    manifest_of,
    open_manifest,
)
from moemerge.output.manifest import (
    BEFORE_TUNING,
    CARD_FILE,
    MANIFEST_FILE,
    OWN_FILES,
    PICTURE_FILE,
    FileEntry,
    Manifest,
    read_manifest,
)
from moemerge.output.ray import write_shards
from moemerge.output.shard_file import checksum, chunk_digest, file_checksum, is_shard
from moemerge.output.state import STATE_DIRECTORY, State
from moemerge.output.verify import Verified, is_whole, verify_checkpoint, verify_shards
from moemerge.output.write import How, write_shard

__all__ = [
    "BEFORE_TUNING",
    "CARD_FILE",
    "CHUNK_BYTES",
    "MANIFEST_FILE",
    "OWN_FILES",
    "PICTURE_FILE",
    "STATE_DIRECTORY",
    "TOKENIZER_FILES",
    "Change",
    "FileEntry",
    "How",
    "Manifest",
    "OutputFile",
    "State",
    "Verified",
    "begin",
    "carried_content",
    "carried_files",
    "changed_sources",
    "check",
    "check_carried",
    "check_shards",
    "check_sources",
    "checksum",
    "chunk_digest",
    "file_checksum",
    "file_names",
    "held",
    "is_finished",
    "is_shard",
    "is_whole",
    "manifest_of",
    "open_manifest",
    "read_manifest",
    "settle",
    "takes_direct",
    "verify_checkpoint",
    "verify_shards",
    "write_shard",
    "write_shards",
    "writing",
]
