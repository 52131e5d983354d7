"""transformers, of any version, as a reader: what a user of that version gets from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from reader import Request, Response, generate, main
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def read(model_dir: Path, request: Request, work: Path) -> Response:
    torch.set_num_threads(1)  # threads that wait for each other are slow where tests share cores
    warnings = _Warnings()
    logging.getLogger("transformers").addHandler(warnings)
    dtype = {"torch_dtype" if transformers.__version__ < "4.56" else "dtype": torch.float32}
    sees = hasattr(AutoConfig.from_pretrained(model_dir), "text_config")
    kind = transformers.AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model, info = kind.from_pretrained(
        model_dir, **dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model.eval()
    response = Response(
        f"transformers {transformers.__version__}",
        # A weight that is made up must never pass unseen, wherever it is said.
        missing=sorted(info["missing_keys"]) or warnings.of_new_weights,
        unexpected=sorted(info["unexpected_keys"]),
        mismatched=sorted(str(mismatch) for mismatch in info["mismatched_keys"]),
    )

    def start() -> Callable[[list[int]], np.ndarray]:
        cache = None
        seen: list[int] = []

        def step(ids: list[int]) -> np.ndarray:
            nonlocal cache
            seen.extend(ids)
            new = seen if cache is None else ids  # a class may make no cache of its own
            with torch.inference_mode():
                # With a cache, one that sees wants positions that only its `generate` makes.
                out = model(torch.tensor([new]), past_key_values=cache, use_cache=not sees)
            cache = out.past_key_values
            return out.logits[0, -len(ids) :].numpy()

        return step

    def encode(text: str) -> list[int]:
        return AutoTokenizer.from_pretrained(model_dir)(text)["input_ids"]

    generate(response, request, encode, start)
    return response


class _Warnings(logging.Handler):
    """Keeps the warnings that speak of weights not found in the checkpoint."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.of_new_weights: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "newly init" in message.lower() or "missing" in message.lower():
            self.of_new_weights.append(message)


if __name__ == "__main__":
    main(read)
