"""mlx-lm as a reader, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer
from reader import Request, Response, generate, main


def read(model_dir: Path, request: Request, work: Path) -> Response:
    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # on the CPU it would call a C++ compiler
    response = Response(f"mlx-lm {version('mlx-lm')}")
    try:
        model, _ = load_model(model_dir, lazy=True)
    except ValueError as error:
        if not _report(str(error), response):
            raise
        return response
    model.set_dtype(mx.float32)

    def start() -> Callable[[list[int]], np.ndarray]:
        cache = make_prompt_cache(model)
        return lambda ids: np.array(model(mx.array([ids]), cache=cache)[0])

    generate(response, request, lambda text: load_tokenizer(model_dir).encode(text), start)
    return response


def _report(error: str, response: Response) -> bool:
    """Sort the error of a strict load into `response`; False if it is another error."""
    kinds = {
        "parameters not in model": response.unexpected,
        "Missing ": response.missing,
        "Expected shape": response.mismatched,
    }
    for sign, names in kinds.items():
        if sign in error:
            _, _, listed = error.partition("\n")
            names += [name.strip(" .") for name in listed.split(",\n") if name] or [error]
            return True
    return False


if __name__ == "__main__":
    main(read)
