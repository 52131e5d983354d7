"""A source's folder: which of its files are the model, as transformers and PEFT choose them.

transformers' order is `_get_resolved_checkpoint_files` in its modeling_utils.py (the same in
versions 4.57 and 5), PEFT's is `load_peft_weights` in its utils/save_and_load.py.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moemerge.checkpoint.formats import in_order, suffix_pattern, weight_suffixes
from moemerge.checkpoint.not_a_model import SourceProblem, other_than_a_model, some
from moemerge.files import WEIGHTS_SUFFIX

_INDEX = ".index.json"
_RANK_FILES = re.compile(rf"shard-\d{{5}}-model-\d{{5}}-of-\d{{5}}{re.escape(WEIGHTS_SUFFIX)}")
"""transformers 5 reads these before all others; each holds a part of every tensor."""
POINTER = "a pointer of Git LFS, not the file itself"
IN_REPOSITORY = "the repository itself holds the pointer: ask its owner to upload the file"


@dataclass(frozen=True)
class Folder:
    """A directory and the names of its files; `listed` are the files on the Hub.

    A `partial` folder is the Hub's cache, opened without a network: it holds what an earlier merge
    needed.
    """

    directory: Path
    names: frozenset[str]
    listed: frozenset[str]
    partial: bool

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter. Many training runs also leave their base's config.json
        there.

        Raises:
            SourceProblem: it is a whole model too.
        """
        if "adapter_config.json" not in self.names:
            return False
        whole = self._there(_model_files()) if "config.json" in self.names else []
        adapter = self._there(_adapter_files())
        if whole and adapter:
            raise SourceProblem(
                f"holds a whole model ({whole[0]}) and an adapter ({adapter[0]}), and transformers "
                "applies the one to the other where PEFT is installed",
                "keep each in a folder of its own, and name the model, or write `model+adapter`",
            )
        return not whole

    @property
    def again(self) -> str:
        """The fix for a missing file."""
        if self.partial:
            return "download it again where there is a network: the Hub's cache holds only a part"
        return "download it again"

    def check(self, files: Iterable[str]) -> None:
        """Refuse `files` that have no content here.

        Raises:
            SourceProblem: a link leads nowhere, or a file is only a pointer of Git LFS.
        """
        lost, pointers = [], []
        for file in sorted(files):
            path = self.directory / file
            if path.exists():
                with path.open("rb") as opened:
                    pointers += [file] if is_pointer(opened) else []
            elif file not in self.listed:
                lost.append(file)
        if lost:
            path = self.directory / lost[0]
            why = f"is a link to {path.readlink()}, which" if path.is_symlink() else "which"
            raise SourceProblem(f"{some(lost)} {why} is not there", self.again)
        if pointers:
            fix = f"run `git lfs pull` in {self.directory}"
            if self.listed or self.partial:
                fix = IN_REPOSITORY
            raise SourceProblem(f"{some(pointers)} is {POINTER}", fix)

    def weights(self, adapter: bool, explicit: object = None) -> Weights:
        """The files that hold the weights; `explicit` is what a config.json says about them.

        Raises:
            SourceProblem: there are none, or some are missing.
        """
        order = _adapter_files() if adapter else _model_files()
        if rank_files := sorted(filter(_RANK_FILES.fullmatch, self.names - self.listed)):
            raise SourceProblem(
                f"holds {some(rank_files)}, each with a part of every tensor",
                "join them with transformers.distributed.checkpoint."
                "consolidate_distributed_checkpoint, and take them out of the folder",
            )
        if explicit is not None and not adapter:
            ends = (WEIGHTS_SUFFIX, WEIGHTS_SUFFIX + _INDEX)
            if not _is_plain_name(explicit) or not str(explicit).endswith(ends):
                what = f"config.json: transformers_weights is {explicit!r}"
                fix = f"name a {WEIGHTS_SUFFIX} file or its index in its folder"
                raise SourceProblem(what, fix)
            order = [glob.escape(str(explicit)), *order]
            if explicit not in self.names:
                raise SourceProblem(f"config.json names {explicit}, which is not there", self.again)
        chosen = next(iter(self._there(order)), None)
        if chosen is None:
            none = f"holds none of {', '.join(n for n in order if not n.endswith(_INDEX))}"
            raise self.problem(none, "download the model's weights")
        self.check([chosen])
        files, index = [chosen], None
        if chosen.endswith(_INDEX):
            files, index = self._shards(chosen, order)
        self.check(files)
        used = {chosen, *files, *(index or {}).values()}
        passed = rf"(adapter_|pytorch_)?model(-\d+-of-\d+)?{suffix_pattern()}(\.index\.json)?"
        others = sorted(name for name in self.names - used if re.fullmatch(passed, name))
        others = [name for name in others if name.startswith("adapter_") == adapter]
        note = f"its weights are {chosen}, which {'PEFT' if adapter else 'transformers'} takes; "
        return Weights(files, index, f"{note}{some(others)} is passed over" if others else "")

    def _there(self, patterns: Iterable[str]) -> list[str]:
        """The names that match the patterns, those of the first pattern first."""
        return [name for one in patterns for name in fnmatch.filter(sorted(self.names), one)]

    def _shards(self, name: str, order: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        index = read_json(self.directory / name).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise SourceProblem(f"{name} has no weight_map", "save the model again")
        for file in index.values():
            if not _is_plain_name(file):
                raise SourceProblem(
                    f"{name} names {file!r}, which leaves its directory",
                    "do not use this model: its index is hostile or broken",
                )
        files = sorted(set(index.values()))
        if strange := [file for file in files if not file.endswith(weight_suffixes())]:
            what = f"{name} names {some(strange)}, which is no file of weights"
            fix = f"save the model again; weights are in files of {', '.join(weight_suffixes())}"
            raise SourceProblem(what, fix)
        there = [file for file in files if file in self.names]
        if there != files and not (self.partial and there):
            gone = [file for file in files if file not in self.names]
            other = [one for one in self._there(order) if one != name]
            stale = f", or remove {name} if the model is {other[0]}" if other else ""
            raise SourceProblem(
                f"{name} names {some(gone)}, which is not there", self.again + stale
            )
        return there, index

    def problem(self, what: str, fix: str) -> SourceProblem:
        """Why there is no model, and how to make one of the files that are there."""
        instead = other_than_a_model(self.directory, self.listed)
        if instead is None:
            return SourceProblem(what, self.again if self.partial else fix)
        return SourceProblem(f"{what}, but {instead[0]}", instead[1])


def _model_files() -> list[str]:
    """Patterns of a model's files; transformers takes the first that exists."""
    return [one.MODEL + end for one in in_order() for end in ("", _INDEX)]


def _adapter_files() -> list[str]:
    """Patterns of an adapter's files for PEFT; files with an index are from transformers."""
    return [one.ADAPTER + end for end in ("", _INDEX) for one in in_order()]


@dataclass(frozen=True)
class Weights:
    """The files of a model's weights, in the order in which they are read.

    `index` says which file holds which tensor, if there is an index. `note` names files that are
    not used.
    """

    files: list[str]
    index: dict[str, str] | None
    note: str

    def compare(self, found: Mapping[str, Collection[str]]) -> str:
        """A note if the index differs from what was `found`, tensor names by file.

        As in transformers, every tensor of the shards is used; of two with one name, the later.

        Raises:
            SourceProblem: a shard lacks a tensor that the index says it has.
        """
        if self.index is None:
            return ""
        of = {name: file for name, file in self.index.items() if file in found}
        if missing := sorted(name for name, file in of.items() if name not in found[file]):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            what = f"its index names {missing[0]!r} in {of[missing[0]]}, which is not there{more}"
            raise SourceProblem(what, "download or save the model again")
        read = {name: file for file in self.files for name in found[file]}
        if other := sorted(name for name, file in read.items() if self.index.get(name) != file):
            where = f"read from {read[other[0]]}, as transformers 5 reads it"
            return f"{some(other)} is {where}, and not where its index says"
        return ""


def is_pointer(file: BinaryIO) -> bool:
    """Whether a file is only a pointer of Git LFS; reads its beginning."""
    return file.read(19) == b"version https://git"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        SourceProblem: it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceProblem(f"{path.name} is not JSON ({error})", "download it again") from error
    if not isinstance(value, dict):
        raise SourceProblem(f"{path.name} is not a JSON object", "download it again")
    return value


def _is_plain_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and not any(sign in file for sign in "/\\\0")
        and file[1:2] != ":"  # a drive of Windows
    )
