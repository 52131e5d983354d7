"""llama.cpp as a reader: its converter makes a GGUF file of the checkpoint, its server runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import xllamacpp
from reader import Request, Response, main


def read(model_dir: Path, request: Request, work: Path) -> Response:
    response = Response(f"llama.cpp {version('xllamacpp')}")
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        gguf_file = Path(scratch) / "model.gguf"
        convert = [sys.executable, "-m", "convert_hf_to_gguf", str(model_dir.resolve())]
        done = subprocess.run(
            [*convert, "--outtype", "f32", "--outfile", str(gguf_file)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            sys.exit(done.returncode)
        server = xllamacpp.Server(_parameters(gguf_file, request))
        for prompt in request.prompts:
            generated, prompt_length = _continue(server, prompt, request.new_tokens)
            response.generated.append(generated)
            response.prompt_lengths.append(prompt_length)
    return response


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
                "logprobs": 1,
                "cache_prompt": False,
            }
        )
        if "choices" not in answer:
            sys.exit(f"llama.cpp: {answer}")
        if not generated:
            prompt_length = answer["usage"]["prompt_tokens"]
        new = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
        if not new:
            sys.exit(f"llama.cpp gave no token: {answer}")
        generated += new
    return generated, prompt_length


if __name__ == "__main__":
    main(read)
