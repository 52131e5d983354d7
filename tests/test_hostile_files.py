"""Files that lie: refused with the reason, nothing run; files that do not: located to the byte."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moemerge.checkpoint.formats import safetensors as safetensors_file
from moemerge.checkpoint.formats import torch_zip as torch_file
from moemerge.checkpoint.location import Location, read_bytes

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def safetensors(path: Path, header: object, data: bytes = bytes(16), length: int = -1) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length if length >= 0 else len(text)) + text + data)
    return path


def test_the_good_header_is_read(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}, "w": ENTRY})
    [(name, found)] = safetensors_file.read_header(path).items()
    assert (name, found.dtype, found.shape, found.nbytes) == ("w", "F32", (2, 2), 16)
    assert found.offset == path.stat().st_size - 16


def entry(**changes: Any) -> dict[str, Any]:
    changed = {**ENTRY, **changes}
    return {"w": {key: value for key, value in changed.items() if value != "GONE"}}


HEADERS = {
    # what it claims: (the header, the reason that is given)
    "nothing of its shape": (entry(shape="GONE"), "'w' has a malformed entry"),
    "nothing of its dtype": (entry(dtype="GONE"), "'w' has a malformed entry"),
    "nothing of its place": (entry(data_offsets="GONE"), "'w' has a malformed entry"),
    "a list": ([ENTRY], "not a JSON object"),
    "a number": (b"17", "not a JSON object"),
    "no JSON": (b"{'w': 1}", "not JSON"),
    "half a JSON": (b'{"w": ', "not JSON"),
    "bytes that are no text": (b"\xff\xfe\xfd\xfc", "header"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep entries": (b'{"w": ' + b"[" * 100_000, "nested too deeply"),
    "a number of many digits": (b'{"w": ' + b"9" * 10_000 + b"}", "digits"),
    "one name twice": (b'{"w": 1, "w": 2}', "twice"),
    "one key twice": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "twice"),
    "an entry that is a list": ({"w": [1, 2]}, "'w' has a malformed entry"),
    "an entry that is text": ({"w": "F32"}, "'w' has a malformed entry"),
    "an entry that is nothing": ({"w": None}, "'w' has a malformed entry"),
    "an unknown dtype": (entry(dtype="F33"), "'w' has dtype 'F33'"),
    "a dtype in lower case": (entry(dtype="f32"), "'w' has dtype 'f32'"),
    "a dtype that is a list": (entry(dtype=["F32"]), "'w' has dtype ['F32']"),
    "a dtype that is nothing": (entry(dtype=None), "'w' has dtype None"),
    "a negative size": (entry(shape=[-2, -2]), "not a natural number"),
    "a fractional size": (entry(shape=[2.0, 2]), "not a natural number"),
    "a bool for a size": (entry(shape=[True, 4]), "not a natural number"),
    "text for a size": (entry(shape=["2", 2]), "not a natural number"),
    "text for a shape": (entry(shape="22"), "not a natural number"),
    "a huge size": (entry(shape=[2**62, 4]), "is not 16 bytes"),
    "sizes whose product is 0 modulo 2^64": (entry(shape=[2**32, 2**32]), "is not 16 bytes"),
    "a size beyond 2^63": (entry(shape=[2**64, 0]), "not a natural number"),
    "a million dimensions": (entry(shape=[2] * 1_000_000), "not a natural number"),
    "an end before the beginning": (entry(data_offsets=[16, 0]), "is not -16 bytes"),
    "a negative beginning": (entry(data_offsets=[-16, 0]), "not a natural number"),
    "a fractional beginning": (entry(data_offsets=[0.0, 16]), "not a natural number"),
    "one offset": (entry(data_offsets=[0]), "malformed"),
    "three offsets": (entry(data_offsets=[0, 8, 16]), "malformed"),
    "offsets of text": (entry(data_offsets="ab"), "not a natural number"),
    "fewer bytes than its shape": (entry(data_offsets=[0, 8]), "is not 8 bytes"),
    "more bytes than its shape": (entry(data_offsets=[0, 32]), "is not 32 bytes"),
    "a place beyond the file": (entry(data_offsets=[16, 32]), "truncated: tensor 'w' ends"),
    "a place beyond every file": (entry(data_offsets=[2**62, 2**62 + 16]), "truncated"),
    "overlapping tensors": ({"w": ENTRY, "v": {**ENTRY, "shape": [2], "data_offsets": [4, 12]}},
                            "'w' and 'v' overlap"),
    "one place twice": ({"w": ENTRY, "v": ENTRY}, "'v' and 'w' overlap"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_safetensors_file_is_refused_that_claims(kind: str, tmp_path: Path) -> None:
    header, reason = HEADERS[kind]
    path = safetensors(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=re.escape(reason)):
        safetensors_file.read_header(path)


@pytest.mark.parametrize(
    "length, reason",
    [(0, "length is 0"), (1, "length is 1"), (2**64 - 1, "no real file"), (10**9, "no real file"),
     (10**7, "truncated"), (300, "truncated")],
)  # fmt: skip
def test_a_safetensors_header_of_a_length_that_cannot_be_is_refused(
    length: int, reason: str, tmp_path: Path
) -> None:
    path = safetensors(tmp_path / "x.safetensors", {"w": ENTRY}, length=length)
    with pytest.raises(ValueError, match=reason):
        safetensors_file.read_header(path)


@pytest.mark.parametrize("size", range(8))
def test_a_safetensors_file_of_a_few_bytes_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0"[:size])
    with pytest.raises(ValueError, match="header"):
        safetensors_file.read_header(path)


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, whole)
    content, cut = whole.read_bytes(), tmp_path / "cut.safetensors"
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError):
            safetensors_file.read_header(cut)


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Reference:
    """Pickles as a reference to a storage."""

    def __init__(self, *parts: object):
        self.parts = parts


class Pickler(pickle._Pickler):  # the one in Python, whose globals can be chosen
    def persistent_id(self, thing: object) -> Any:
        return thing.parts if isinstance(thing, Reference) else None


def pickled(thing: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(thing)
    return buffer.getvalue()


def bin_file(path: Path, pickle_bytes: bytes, data: bytes = bytes(16), **more: Any) -> Path:
    """A zip as torch.save makes one, with any pickle."""
    with zipfile.ZipFile(path, "w", more.pop("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("x/data.pkl", pickle_bytes)
        archive.writestr("x/data/0", data)
        for name, content in more.items():
            archive.writestr(f"x/{name}", content)
    return path


STORAGE = Reference("storage", torch.FloatStorage, "0", "cpu", 4)


def tensor(
    storage: object = STORAGE, start: Any = 0, shape: Any = (2, 2), stride: Any = (2, 1)
) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, start, shape, stride, False, {})


def storage(*parts: object) -> Call:
    return tensor(Reference(*parts))


FLOAT = torch.FloatStorage
THINGS = {
    # what a pickle does: (what it holds, the reason that is given)
    "runs a shell": (Call(os.system, "touch ran"), "posix.system"),
    "evaluates": (Call(eval, "open('ran', 'w')"), ".eval"),
    "opens a file": (Call(open, "ran", "w"), "io.open"),
    "gets attributes": (Call(getattr, "a", "upper"), ".getattr"),
    "builds a module": (Call(torch.nn.Linear, 1, 1), "torch.nn.modules.linear.Linear"),
    "loads another file": (Call(torch.load, "x"), "torch.serialization.load"),
    "rebuilds from numpy": (np.ones(2), "numpy"),
    "makes a set": ({1, 2}, "no dict of tensors"),
    "makes bytes": (bytearray(5), "no dict of tensors"),
    "makes a dict of pairs": (Call(OrderedDict, [("a", 1)]), "TypeError"),
    "holds a set": ({"w": {1, 2}}, "'w' is not a plain tensor"),
    "calls what gives a tensor its kind": (
        Call(torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, ("1",), {}), ".eval"
    ),
    "gives a kind to no tensor": (
        {"w": Call(torch._tensor._rebuild_from_type_v2, 5, torch.Tensor, (), {})}, "malformed"
    ),
    "holds text": ({"w": "text"}, "'w' is not a plain tensor"),
    "holds a state in a state": ({"model": {"w": tensor()}}, "'model' is not a plain tensor"),
    "holds a number": ({"epoch": 3}, "'epoch' is not a plain tensor"),
    "holds a list": ([1, 2], "no dict of tensors"),
    "holds a lone tensor": (tensor(), "no dict of tensors"),
    "has numbers for names": ({1: tensor()}, "key that is not text"),
    "is not row-major": ({"w": tensor(stride=(1, 2))}, "'w' is not contiguous"),
    "repeats a row": ({"w": tensor(stride=(0, 1))}, "'w' is not contiguous"),
    "begins before its storage": ({"w": tensor(start=-1)}, "malformed tensor"),
    "begins at a fraction": ({"w": tensor(start=0.0)}, "malformed tensor"),
    "begins at a bool": ({"w": tensor(start=True)}, "malformed tensor"),
    "ends beyond its storage": ({"w": tensor(start=1)}, "truncated: tensor 'w'"),
    "is huge": ({"w": tensor(shape=(2**40, 2**20), stride=(2**20, 1))}, "truncated"),
    "is beyond 2^63": ({"w": tensor(shape=(2**64, 0), stride=(1, 1))}, "malformed tensor"),
    "has a negative size": ({"w": tensor(shape=(-2, -2))}, "malformed tensor"),
    "has a negative stride": ({"w": tensor(stride=(-2, 1))}, "malformed tensor"),
    "has a list for a shape": ({"w": tensor(shape=[2, 2])}, "malformed tensor"),
    "has a stride too few": ({"w": tensor(stride=(1,))}, "malformed tensor"),
    "has a million dimensions": ({"w": tensor(shape=(2,) * 10**6, stride=(0,) * 10**6)},
                                 "malformed tensor"),
    "has no storage": ({"w": tensor(storage="0")}, "malformed tensor"),
    "has too little data": ({"w": storage("storage", FLOAT, "0", "cpu", 9)}, "truncated: tensor"),
    "has too much data": ({"w": storage("storage", FLOAT, "0", "cpu", 3)}, "truncated: tensor"),
    "has data that is not there": ({"w": storage("storage", FLOAT, "7", "cpu", 4)},
                                   "'w' has no uncompressed data"),
    "leaves the zip": ({"w": storage("storage", FLOAT, "../data.pkl", "cpu", 4)},
                       "'w' has no uncompressed data"),
    "has a key that is no text": ({"w": storage("storage", FLOAT, 0, "cpu", 4)}, "not a storage"),
    "has a size that is no number": ({"w": storage("storage", FLOAT, "0", "cpu", "4")}, "no size"),
    "has complex values": ({"w": storage("storage", torch.ComplexFloatStorage, "0", "cpu", 2)},
                           "torch.ComplexFloatStorage"),
    "refers to no storage": ({"w": storage("module", FLOAT, "0", "cpu", 4)}, "not a storage"),
    "refers with too little": ({"w": storage("storage", FLOAT)}, "not enough values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", THINGS)
def test_a_bin_is_refused_whose_pickle(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    thing, reason = THINGS[kind]
    path = bin_file(tmp_path / "x.bin", pickled(thing))
    with pytest.raises(ValueError, match=re.escape(reason)):
        torch_file.read_header(path)
    assert [found.name for found in tmp_path.iterdir()] == ["x.bin"]


def test_the_good_pickle_is_read(tmp_path: Path) -> None:
    state = OrderedDict(w=tensor())
    path = bin_file(tmp_path / "x.bin", pickled(state), bytes(range(16)))
    assert read_bytes(torch_file.read_header(path)["w"]) == bytes(range(16))


def nested_tuples(end: bytes) -> bytes:
    """t = (t, t), two hundred times, and then `end`: to hash or print it takes for ever."""
    return b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + end


LONG = struct.pack("<q", 2**40)
PICKLES = {
    # what the bytes do: (the bytes, the reason that is given)
    "are empty": (b"", "pickle exhausted"),
    "have no end": (b"\x80\x02}", "pickle exhausted"),
    "end before they begin": (b"\x80\x02.", "damaged"),
    "are no pickle": (b"hello", "damaged (KeyError"),
    "claim a terabyte of bytes": (b"\x80\x04\x8e" + LONG, "expected 1099511627776 bytes"),
    "claim a terabyte of text": (b"\x80\x04\x8d" + LONG, "expected 1099511627776 bytes"),
    "claim a terabyte of bytearray": (b"\x80\x05\x96" + LONG, "expected 1099511627776 bytes"),
    "claim a number of 2 GB": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1), "not enough data"),
    "claim a negative length": (b"\x80\x02\x8b" + struct.pack("<i", -1), "byte count < 0"),
    "spell a number of many digits": (b"\x80\x02I" + b"9" * 10_000 + b"\n.", "digits"),
    "recall what is not there": (b"\x80\x02h\x05.", "damaged (KeyError"),
    "hash tuples of tuples": (nested_tuples(b"q\x00}h\x00Ns."), "key that is not text"),
    "call tuples of tuples": (nested_tuples(b")R."), "calls what is no function"),
    "ask for tuples of tuples": (nested_tuples(b"q\x00X\x05\0\0\0torchh\x00\x93."), "a name"),
    "refer to tuples of tuples": (nested_tuples(b"Q."), "not enough values"),
    "make an instance": (b"\x80\x02cbuiltins\neval\n)\x81.", "builtins.eval"),
    "make an instance of what is known": (
        b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses NEWOBJ",
    ),
    "make an old instance": (b"(ibuiltins\neval\n.", "uses INST"),
    "use an extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "set a state on a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\0\0\0__code__Nsb.", "no dict",
    ),
    "set a state on a number": (b"\x80\x02K\x01}b.", "no dict"),
    "append to a number": (b"\x80\x02K\x01K\x02a.", "damaged (AttributeError"),
    "close a list that is not open": (b"\x80\x02}u.", "damaged (IndexError"),
    "give half a pair": (b"\x80\x02}(X\x01\0\0\0au.", "damaged|shorter"),
    "nest lists deeply": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "no dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLES)
def test_a_bin_is_refused_whose_pickled_bytes(kind: str, tmp_path: Path) -> None:
    content, reason = PICKLES[kind]
    path = bin_file(tmp_path / "x.bin", content)
    with pytest.raises(ValueError, match="|".join(map(re.escape, reason.split("|")))):
        torch_file.read_header(path)


GOOD = pickled({"w": tensor()})


def test_a_bin_that_names_memory_far_away_costs_none(tmp_path: Path) -> None:
    """Python's own unpickler makes a table of 34 GB for it."""
    path = bin_file(tmp_path / "x.bin", b"\x80\x02}r\xff\xff\xff\x7f.")
    tracemalloc.start()
    assert torch_file.read_header(path) == {}
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def no_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", bytes(16))


def two_pickles(path: Path) -> None:
    bin_file(path, GOOD, **{"y/data.pkl": GOOD})


def encrypted(path: Path) -> None:
    bin_file(path, GOOD)
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + at] |= 1
    path.write_bytes(content)


def big_endian(path: Path) -> None:
    bin_file(path, GOOD, byteorder=b"big")


def endless_byteorder(path: Path) -> None:
    bin_file(path, GOOD, byteorder=b"little" * 1000)


def swollen(path: Path) -> None:
    """A pickle of 50 MB of zeros in 50 kB."""
    bin_file(path, bytes(50_000_000), compression=zipfile.ZIP_DEFLATED)


def too_large(path: Path) -> None:
    bin_file(path, b"]" * (torch_file.MAX_PICKLE_BYTES + 1))


def compressed_data(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", GOOD)
        archive.writestr("x/data/0", bytes(16), zipfile.ZIP_DEFLATED)


def damaged_entry(path: Path) -> None:
    bin_file(path, GOOD)
    content = path.read_bytes()
    at = content.rindex(b"PK\x03\x04")
    path.write_bytes(content[:at] + b"PK\x07\x08" + content[at + 4 :])


def damaged_directory(path: Path) -> None:
    bin_file(path, GOOD)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x09\x09"))


def claims_more(path: Path) -> None:
    """The directory says that the storage is larger than the file, and so does the pickle."""
    bin_file(path, pickled({"w": storage("storage", FLOAT, "0", "cpu", 2**20)}))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**22, 2**22)
    path.write_bytes(content)


ZIPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "has no pickle": (no_pickle, "no single data.pkl"),
    "has two pickles": (two_pickles, "no single data.pkl"),
    "is encrypted": (encrypted, "damaged (RuntimeError"),
    "is big-endian": (big_endian, "big-endian"),
    "has an endless byteorder": (endless_byteorder, "byteorder is 6000 bytes"),
    "swells": (swollen, "compressed"),
    "has an endless pickle": (too_large, "which no model needs"),
    "has compressed data": (compressed_data, "'w' has no uncompressed data"),
    "has a damaged entry": (damaged_entry, "'w': its zip entry is damaged"),
    "has a damaged directory": (damaged_directory, "damaged (BadZipFile"),
    "claims more than it is": (claims_more, "truncated: tensor 'w'"),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_a_bin_is_refused_whose_zip(kind: str, tmp_path: Path) -> None:
    make, reason = ZIPS[kind]
    make(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=re.escape(reason)):
        torch_file.read_header(tmp_path / "x.bin")


def test_a_bin_cut_or_changed_anywhere_is_refused_or_read_within_itself(tmp_path: Path) -> None:
    path, broken = tmp_path / "x.bin", tmp_path / "broken.bin"
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        changed = bytearray(content[: draw.choice([len(content), draw.randrange(len(content))])])
        for _ in range(draw.randrange(4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        broken.write_bytes(changed)
        try:
            found = torch_file.read_header(broken)
        except (ValueError, OSError):
            continue
        for location in found.values():
            assert 0 <= location.offset <= location.offset + location.nbytes <= len(changed)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def raw(value: torch.Tensor) -> bytes:
    flat = value.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def random_tensors(draw: random.Random, views: bool) -> dict[str, torch.Tensor]:
    """Tensors of every dtype and of 0 to 4 dimensions; some are views of one storage."""
    found: dict[str, torch.Tensor] = {}
    for number in range(draw.randrange(1, 12)):
        dtype = draw.choice(DTYPES)
        shape = [draw.randrange(5) for _ in range(draw.randrange(5))]
        value = torch.randint(0, 2, shape).to(dtype)
        if views and draw.random() < 0.5:
            whole = torch.randint(-100, 100, (20, 6)).to(dtype)
            start = draw.randrange(10)
            value = whole[start : start + draw.randrange(10)]
            found[f"whole.{number}"] = whole
        if views and value.is_floating_point() and draw.random() < 0.3:
            value = torch.nn.Parameter(value)
        found[f"läyer.{number}.weight"] = value
    return found


def check(found: dict[str, Location], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == tuple(value.shape)
        assert read_bytes(found[name]) == raw(value), name


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_what_torch_saves_is_found_to_the_byte(
    seed: int, kind: type[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    wanted = kind(random_tensors(random.Random(seed), views=True))
    torch.save(wanted, tmp_path / "x.bin", pickle_protocol=2 + seed % 4)
    check(torch_file.read_header(tmp_path / "x.bin"), wanted)


@pytest.mark.parametrize("seed", range(25))
def test_what_safetensors_saves_is_found_to_the_byte(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    wanted = random_tensors(random.Random(seed), views=False)
    save_file(wanted, tmp_path / "x.safetensors", metadata={"format": "pt"})
    check(safetensors_file.read_header(tmp_path / "x.safetensors"), wanted)


def test_a_modules_state_dict_is_found_to_the_byte(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].weight.requires_grad_(False)
    torch.save(module.state_dict(), tmp_path / "x.bin")  # with its `_metadata`
    check(torch_file.read_header(tmp_path / "x.bin"), dict(module.state_dict()))
    torch.save(dict(module.named_parameters()), tmp_path / "x.bin")
    check(torch_file.read_header(tmp_path / "x.bin"), dict(module.named_parameters()))


def test_a_transposed_tensor_is_refused_and_not_read_wrong(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3).T}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="'w' is not contiguous"):
        torch_file.read_header(tmp_path / "x.bin")
