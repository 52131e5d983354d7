"""A `.bin` shard's tensors, located without torch and without running anything in the file.

`torch.save` writes an uncompressed zip: `data.pkl` describes the tensors, `data/KEY` holds each
storage's bytes. The tensors that `_torch_pickle` finds are checked like a safetensors header.
"""

from __future__ import annotations

import math
import struct
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from moemerge.checkpoint.formats._torch_pickle import Tensor, unpickle
from moemerge.checkpoint.location import PLAIN, Location
from moemerge.hub import HubError

SUFFIXES = (".bin", ".pt", ".pth")
MODEL, ADAPTER = "pytorch_model.bin", "adapter_model.bin"
ORDER = 1
STREAMS = False
"""The place of a tensor is beside its data in a zip, so that finding it would cost a request for
each tensor."""

FIX = (
    "download it again if it is damaged, or save the model as safetensors: "
    "from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)

MAX_PICKLE_BYTES = 10_000_000
"""Ten times what the largest model's shard needs; it bounds memory and time."""


def read_header(path: Path, remote: BinaryIO | None = None) -> dict[str, Location]:
    """The tensors of a `.bin` file by name.

    With `remote`, the file is read there and `path` is where it will be; offsets are then 0.

    Raises:
        ValueError: the file is not a zip of `torch.save`, or holds what is not a plain tensor.
        OSError: the file cannot be read.
    """
    try:
        return _read_zip(path, remote)
    except (ValueError, OSError, HubError):
        raise
    except Exception as error:  # a hostile zip or pickle can raise anything
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def _read_zip(path: Path, remote: BinaryIO | None) -> dict[str, Location]:
    if remote is None:
        path.open("rb").close()  # is_zipfile takes what cannot be read for no zip
    if not zipfile.is_zipfile(remote or path):
        raise ValueError(
            "it is not a zip (torch's format since 1.6, or truncated): load it once with "
            "torch.load(..., weights_only=True) and save it with safetensors.torch.save_file"
        )
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(remote or path))
        file = None if remote else stack.enter_context(path.open("rb"))
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no single data.pkl; it was not written by torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(root + "byteorder")
        if order and _member(archive, order, 16) != b"little":
            raise ValueError("it is big-endian; convert it to safetensors where it was made")
        content = unpickle(_member(archive, members[pickles[0]], MAX_PICKLE_BYTES))
        if not isinstance(content, dict):
            raise ValueError("it holds no dict of tensors")
        if not all(isinstance(name, str) for name in content):
            raise ValueError("it holds a dict with a key that is not text")
        return {
            name: _locate(name, tensor, path, root, members, file)
            for name, tensor in content.items()
        }


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """A small member of the zip. torch compresses none, so none can grow."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {info.filename} is compressed, which torch.save never does")
    if info.file_size > most:
        raise ValueError(f"its {info.filename} is {info.file_size} bytes, which no model needs")
    with archive.open(info) as stream:
        return stream.read(most)


def _locate(
    name: str,
    tensor: object,
    path: Path,
    root: str,
    members: dict[str, zipfile.ZipInfo],
    file: BinaryIO | None,
) -> Location:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name!r} is not a plain tensor")
    storage, shape = tensor.storage, tensor.shape
    info = members.get(f"{root}data/{storage.key}")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"tensor {name!r} has no uncompressed data")
    encoding = PLAIN[tensor.dtype]
    if PLAIN[storage.dtype].nbytes(storage.count) != info.file_size:
        raise ValueError(
            f"it is truncated: tensor {name!r} lies in {storage.count} values of {storage.dtype}, "
            f"its data is {info.file_size} bytes"
        )
    row_major = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = zip(shape, tensor.stride, row_major, strict=True)
    if math.prod(shape) and any(size > 1 and have != want for size, have, want in strides):
        raise ValueError(f"tensor {name!r} is not contiguous")
    end = encoding.nbytes(tensor.start + math.prod(shape))
    if end > info.file_size:
        raise ValueError(f"it is truncated: tensor {name!r} needs more bytes than it holds")
    if file is None:
        return Location(path, 0, encoding, shape, negative=tensor.negative)
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"tensor {name!r}: its zip entry is damaged")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    begin = info.header_offset + 30 + name_length + extra_length
    if begin + info.file_size > path.stat().st_size:
        raise ValueError(f"it is truncated: tensor {name!r} needs more bytes than it holds")
    begin += encoding.nbytes(tensor.start)
    return Location(path, begin, encoding, shape, negative=tensor.negative)
