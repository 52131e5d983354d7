"""The section of a card that tells how to run the mixture, in each program that can."""

from __future__ import annotations

from collections.abc import Iterator

from moemerge.plan import Plan
from moemerge.prepare import Prepared, caveats

_PYTHON = """\
```python
# pip install torch "transformers>={version}"
from transformers import {kind}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
model = {kind}.from_pretrained(".", dtype="auto")
{inputs}
output = model.generate(**inputs, max_new_tokens=64)
new = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(new, skip_special_tokens=True))
```"""
_PROMPT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
_CHAT = """\
messages = [{"role": "user", "content": "What can you do?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_OTHERS = {
    "llama.cpp": """\
# llama.cpp: convert once, then run
convert_hf_to_gguf.py . --outfile model.gguf && llama-cli -m model.gguf -p "Once upon a time\"""",
    "mlx-lm": """\
# mlx-lm, on a Mac
mlx_lm.generate --model . --prompt "Once upon a time\"""",
    "vLLM": """\
# vLLM: a server that speaks OpenAI's protocol
vllm serve .""",
}
"""How other programs run it, by the name of each in `READERS`."""


def running(ready: Prepared) -> Iterator[str]:
    """A script that generates text, and the commands of other readers."""
    names = {path.name for path in ready.carried}
    chat = any(name.startswith("chat_template") for name in names)
    if "tokenizer_config.json" in names and not chat:
        said = (ready.base.model.directory / "tokenizer_config.json").read_bytes()
        chat = b'"chat_template"' in said
    yield "## Running it"
    if ready.plan.is_gguf:
        yield from of_file(ready.plan)
        return
    yield (
        "`.` stands for this directory; get it with `hf download user/name --local-dir .` if it is "
        "on the Hub, or write its name there, `user/name`, in place of `.` (not for llama.cpp)."
    )
    tokenizer = '"."'
    if not any(name.startswith(("tokenizer", "vocab")) for name in names):
        tokenizer = f'"{ready.base.model.reference.repo or "path/to/the/base/model"}"'
        yield "It comes without a tokenizer: the base model's is the one."
    known = ready.target.architecture.READERS
    yield _PYTHON.format(
        tokenizer=tokenizer,
        inputs=_CHAT if chat else _PROMPT,
        version="4.57" if "transformers 4.57" in known else "5",
        kind="AutoModelForImageTextToText" if sees(ready.plan) else "AutoModelForCausalLM",
    )
    target, config = ready.target, ready.base.model.config
    told = caveats(target.architecture, config, target.mixture)
    cannot = {reader for reader, line in told if "cannot" in line}
    others = [
        lines for reader, lines in _OTHERS.items() if reader in known and reader not in cannot
    ]
    if others:
        yield "\n".join(["```sh", *others, "```"])


def of_file(plan: Plan) -> Iterator[str]:
    """How to get and run a GGUF file."""
    first = plan.shards[0].file
    yield (
        "Get it with `hf download user/name --local-dir .` if it is on the Hub; "
        "`moemerge verify` checks it."
    )
    yield "\n".join([
        "```sh", f'llama-cli -m {first} -p "Once upon a time"    # llama.cpp',
        f"moemerge chat {first}", "```",
    ])  # fmt: skip


def sees(plan: Plan) -> bool:
    """Whether the mixture also sees, or hears: its language part is only one of its parts."""
    return "text_config" in plan.config
