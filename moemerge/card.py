"""The model card: metadata the Hub understands, who the experts are, and how to load the model."""

from __future__ import annotations

from moemerge.checkpoint import Checkpoint
from moemerge.config import MergeConfig
from moemerge.plan import Plan
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
        f"| {index} | {name} | {_prompts(expert.positive_prompts)} | "
        f"{_prompts(expert.negative_prompts)} |"
        for index, (name, expert) in enumerate(zip(plan.experts, config.experts, strict=True))
    ]
    total, active = plan.parameters / 1e9, plan.active_parameters / 1e9
    return "\n".join(
        [
            "---",
            data.to_yaml().strip(),
            "---",
            f"# A mixture of {len(plan.experts)} experts",
            "",
            f"{total:.3g}B parameters, {active:.3g}B active a token "
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
            "```yaml",
            config.as_yaml().strip(),
            "```",
            "",
        ]
    )


def _prompts(prompts: tuple[str, ...]) -> str:
    shown = [prompt if len(prompt) <= 60 else prompt[:57] + "..." for prompt in prompts]
    return "; ".join(" ".join(prompt.split()).replace("|", "\\|") for prompt in shown) or "-"
