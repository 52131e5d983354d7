"""Why a folder is not a model, and how to make a model of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from moemerge.checkpoint.formats import suffix_pattern

ORIGINALS = "merge from the original weights: a merge cannot read quantised ones"
GATHER = (
    "gather it: `python zero_to_fp32.py . gathered --safe_serialization`, and copy its config.json "
    "and tokenizer there"
)
_FOREIGN = (
    # a file's or folder's name (WEIGHTS: any format's suffix), what it is, what makes a model of it
    (r"zero_to_fp32\.py|global_step\d+|.*(mp|zero_pp)_rank_\d+.*\.pt", "a DeepSpeed checkpoint",
     GATHER),
    (r".*\.distcp|pytorch_model_fsdp_\d+", "a distributed checkpoint of FSDP",
     "join it: `accelerate merge-weights FOLDER_OF_ITS_DISTCP_FILES joined`, and copy its "
     "config.json and tokenizer there"),
    (r"(adapter_|pytorch_)?model-\d+-of-\d+WEIGHTS", "shards without their index",
     "download or copy the file that ends with .index.json too"),
    (r"(pytorch_)?model\.[\w-]+(-\d+-of-\d+)?WEIGHTS|.*\.index\.[\w-]+\.json",
     "a variant, which is loaded by its name alone",
     "load it with from_pretrained(..., variant=NAME) and save it with save_pretrained"),
    (r"consolidated\..*|params\.json", "in Mistral's or Meta's own format",
     "download the files in transformers' format, or convert it with the script in transformers' "
     "folder of its family"),
    (r".*\.gguf", "GGUF", ORIGINALS),
    (r"tf_model.*\.h5|flax_model.*\.msgpack|model\.ckpt.*", "of TensorFlow or Flax",
     "load it in transformers 4 with from_tf=True or from_flax=True and save it"),
    (r".*\.(pt|pth|ckpt|npz|onnx|nemo)", "in another program's format",
     "convert it to transformers' format (config.json and model.safetensors)"),
)  # fmt: skip
"""What a folder without a model may hold, the likeliest first."""


class SourceProblem(Exception):
    """A source that cannot be opened: `what` is wrong with it, and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def other_than_a_model(directory: Path, listed: Collection[str]) -> tuple[str, str] | None:
    """What a folder holds instead of a model, and the fix.

    `listed` are the files of a repository on the Hub.
    """
    paths = set(listed)
    if not listed:
        for path in directory.iterdir():
            paths.add(path.name)
            with suppress(OSError):
                paths |= {f"{path.name}/{one.name}" for one in path.iterdir()}
    top = {path.split("/")[0] for path in paths}
    if found := _foreign(top):
        return found
    if {"refs", "snapshots"} <= top:
        commits = sorted(path for path in paths if path.startswith("snapshots/"))
        fix = "name the model by its id, user/name" + "".join(f", or {c}" for c in commits[:1])
        return "it is a repository's folder in the Hub's cache", fix
    ends = ("/config.json", "/adapter_config.json")
    if models := [path.rpartition("/")[0] for path in paths if path.endswith(ends)]:
        latest = max(models, key=_number)
        fix = "download it and name that folder" if listed else "name that folder"
        return f"there is a model in its folder {latest}", fix
    return _foreign(paths)


def some(names: Collection[str]) -> str:
    """The first name, and the number of the others."""
    first = next(iter(names))
    return f"{first} (and {len(names) - 1} more)" if len(names) > 1 else first


def _foreign(names: Iterable[str]) -> tuple[str, str] | None:
    listed = sorted(names)
    for pattern, kind, fix in _FOREIGN:
        pattern = pattern.replace("WEIGHTS", suffix_pattern())
        found = [name for name in listed if re.fullmatch(pattern, name.rpartition("/")[2])]
        if found:
            return f"{some(found)}, which is {kind}", fix
    return None


def _number(folder: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", folder)
    return (int(digits[-1]) if digits else -1, folder)
