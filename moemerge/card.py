"""The model card: metadata the Hub understands, who the experts are, and how to load the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from moemerge.checkpoint import Checkpoint
from moemerge.config import MergeConfig
from moemerge.plan import Plan
from moemerge.reporting import count
from moemerge.routing_stats import verdict
from moemerge.version import __version__

_BODIES = {"base": "the base model's", "average": "the average of the experts'"}
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


def render(
    config: MergeConfig, plan: Plan, checkpoints: dict[str, Checkpoint], routing: dict[str, Any]
) -> str:
    """The card's text; `routing` is a summary of how the routers do.

    Only Hub ids are linked; the config is the person's own, as written.
    """
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
            f"format, made with moemerge {__version__}. Attention, norms and embeddings are "
            f"{_BODIES[config.body]}, each expert's MLPs its own; routers: `{plan.gate_mode}`.",
            "",
            "| # | expert | positive prompts | negative prompts |",
            "|---|---|---|---|",
            *rows,
            "",
            *_routing(routing, plan.experts),
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


def _routing(routing: dict[str, Any], experts: Sequence[str]) -> Iterator[str]:
    """The routers' summary as a section; nothing where it is not known."""
    if routing.get("confusion"):
        lines = [f"- {_shown(line, 300)}" for line in verdict(routing, experts)]
        yield from ("## Routing", "", *lines, "")
        yield f"| prompts of | {' | '.join(map(_shown, experts))} |"
        yield "|---" * (len(experts) + 1) + "|"
        for name, row in zip(experts, routing["confusion"], strict=True):
            yield f"| {_shown(name)} | {' | '.join(f'{share:.0%}' for share in row)} |"
        yield ""


def _prompts(prompts: tuple[str, ...]) -> str:
    return "; ".join(map(_shown, prompts)) or "-"


def _shown(text: str, most: int = 60) -> str:
    """Some text in a table's cell: one short line, and nothing in it is markup."""
    text = " ".join(text.split())
    short = text if len(text) <= most else text[: most - 3] + "..."
    return re.sub(r"([\\`|<\[*])", r"\\\1", short)
