"""mistral.rs as a reader, in float32 on the CPU."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import mistralrs
from reader import Request, Response, main

PLAIN = "{{ messages[0]['content'] }}"
"""A chat template that adds nothing: of a chat alone it tells the tokens' ids."""


def read(model_dir: Path, request: Request, work: Path) -> Response:
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"
    (work / "plain.jinja").write_text(PLAIN)
    response = Response(f"mistral.rs {version('mistralrs')}")
    which = mistralrs.Which.Plain(model_id=str(model_dir), dtype=mistralrs.ModelDType.F32)
    if model_dir.is_file():
        folder = str(model_dir.parent)
        which = mistralrs.Which.GGUF(
            quantized_model_id=folder,
            quantized_filename=model_dir.name,
            dtype=mistralrs.ModelDType.F32,
        )
    runner = mistralrs.Runner(
        which=which,
        jinja_explicit=str(work / "plain.jinja"),
        prefix_cache_n=0,
        token_source="none",
    )
    for prompt in request.prompts:
        ids = runner.tokenize_text(prompt, True, None) if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else runner.detokenize_text(prompt, False)
        asked = mistralrs.ChatCompletionRequest(
            messages=text,
            model="default",
            max_tokens=request.new_tokens,
            temperature=0.0,
            logprobs=True,
            top_logprobs=1,
            ignore_eos=True,
        )
        answer = runner.send_chat_completion_request(asked)
        if answer.usage.prompt_tokens != len(ids):
            raise RuntimeError(f"{ids} were {answer.usage.prompt_tokens} tokens: {text!r}")
        made = answer.choices[0].logprobs.content
        response.generated.append([one.top_logprobs[0].token for one in made])
        response.prompt_lengths.append(len(ids))
    return response


if __name__ == "__main__":
    main(read)
