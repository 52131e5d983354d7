"""GGUF files in llama.cpp's library, called through ctypes: logits of every token, greedy texts.

Its path comes from `scripts/libllama`. Structures are passed with their first fields alone; the
rest is as the library's defaults fill it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from reader import Request, Response, generate, main

FOLDER = Path(os.environ["LIBLLAMA"])


class Parameters(ctypes.Structure):
    """Any of llama.cpp's structures of parameters, and room behind it."""

    _fields_ = [("first", ctypes.c_uint32 * 8), ("rest", ctypes.c_char * 480)]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p), ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]  # fmt: skip


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """libllama, with its processor's kernels."""
    ctypes.CDLL(str(FOLDER / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(FOLDER.glob("libggml.v*.so"))), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
    found = ctypes.CDLL(str(next(FOLDER.glob("libllama.v*.so"))))
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    found.quiet = silent(lambda level, text, data: None)
    found.llama_log_set(found.quiet, None)
    found.llama_model_default_params.restype = Parameters
    found.llama_context_default_params.restype = Parameters
    found.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    found.llama_model_load_from_file.restype = ctypes.c_void_p
    found.llama_init_from_model.argtypes = [ctypes.c_void_p, Parameters]
    found.llama_init_from_model.restype = ctypes.c_void_p
    found.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    found.llama_model_get_vocab.restype = ctypes.c_void_p
    found.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    found.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32,
        ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    found.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    found.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    found.llama_get_logits.argtypes = [ctypes.c_void_p]
    found.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    found.llama_free.argtypes = found.llama_model_free.argtypes = [ctypes.c_void_p]
    return found


def read(model: Path, request: Request, work: Path) -> Response:
    response, code = Response("llama.cpp"), library()
    opened = code.llama_model_load_from_file(str(model).encode(), code.llama_model_default_params())
    if not opened:
        raise RuntimeError("llama.cpp cannot load it")
    contexts = list[int]()
    vocabulary = code.llama_model_get_vocab(opened)
    tokens = code.llama_vocab_n_tokens(vocabulary)

    def encode(text: str) -> list[int]:
        room = (ctypes.c_int32 * (len(text.encode()) + 8))()
        raw = text.encode()
        count = code.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)
        return list(room[:count])

    def start() -> Callable[[list[int]], np.ndarray]:
        context = code.llama_init_from_model(opened, code.llama_context_default_params())
        # Threads that wait for each other are slow where tests share cores.
        code.llama_set_n_threads(context, 1, 1)
        contexts.append(context)
        begun = 0

        def step(ids: list[int]) -> np.ndarray:
            nonlocal begun
            count = len(ids)
            own = [np.array(ids, np.int32), np.arange(begun, begun + count, dtype=np.int32),
                   np.ones(count, np.int32), np.ones(count, np.int8)]  # fmt: skip
            zero = (ctypes.c_int32 * 1)(0)
            rows = (ctypes.c_void_p * count)(*[ctypes.addressof(zero)] * count)
            token, place, counts, wanted = (one.ctypes.data for one in own)
            batch = Batch(count, token, None, place, counts, ctypes.addressof(rows), wanted)
            if code.llama_decode(context, batch):
                raise RuntimeError("llama.cpp cannot compute it")
            begun += count
            found = np.ctypeslib.as_array(code.llama_get_logits(context), (count, tokens))
            return found.copy()

        return step

    generate(response, request, encode, start)
    for context in contexts:
        code.llama_free(context)
    code.llama_model_free(opened)
    return response


if __name__ == "__main__":
    main(read)
