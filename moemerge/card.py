"""The model card: metadata the Hub understands, who the experts are, and how to load the model."""

from __future__ import annotations

import re

from moemerge.checkpoint import Checkpoint
from moemerge.config import MergeConfig
from moemerge.plan import Plan
from moemerge.reporting import count
from moemerge.version import __version__

_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{here}")
model = AutoModelForCausalLM.from_pretrained("{here}", dtype="auto")
```

```sh
convert_hf_to_gguf.py {here} --outfile model.gguf     # llama.cpp
mlx_lm.generate --model {here} --prompt "Hello"       # mlx
vllm serve {here}                                     # vLLM
```
"""


def render(config: MergeConfig, plan: Plan, checkpoints: dict[str, Checkpoint]) -> str:
    """The card's text. Only Hub ids are linked; the config is the person's own, as written."""
    from huggingface_hub import ModelCardData

    models = [c for c in checkpoints.values() if not c.is_adapter and c.reference.repo]
    data = ModelCardData(
        base_model=[checkpoint.reference.repo for checkpoint in models] or None,
        base_model_relation="merge" if models else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moe", "merge", "moemerge", plan.architecture],
    )
    rows = [
        f"| {index} | {_shown(name)} | {_prompts(expert.positive_prompts)} | "
        f"{_prompts(expert.negative_prompts)} |"
        for index, (name, expert) in enumerate(zip(plan.experts, config.experts, strict=True))
    ]
    text = config.as_yaml().strip()
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return "\n".join(
        [
            "---",
            data.to_yaml().strip(),
            "---",
            f"# A mixture of {len(plan.experts)} experts",
            "",
            f"{count(plan.parameters)} parameters, {count(plan.active_parameters)} active a token "
            f"({plan.experts_per_token} of {len(plan.experts)} experts), in {plan.architecture} "
            f"format, made with moemerge {__version__}. Attention, norms and embeddings are the "
            f"base model's, each expert's MLPs its own; routers: `{plan.gate_mode}`.",
            "",
            "| # | expert | positive prompts | negative prompts |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Loading",
            "",
            _LOADING.format(here="path/or/repository").strip(),
            "",
            "## Config",
            "",
            f"{fence}yaml",
            text,
            fence,
            "",
        ]
    )


def _prompts(prompts: tuple[str, ...]) -> str:
    return "; ".join(map(_shown, prompts)) or "-"


def _shown(text: str) -> str:
    """Some text in a table's cell: one short line, and nothing in it is markup."""
    text = " ".join(text.split())
    short = text if len(text) <= 60 else text[:57] + "..."
    return re.sub(r"([\\`|<\[*])", r"\\\1", short)
