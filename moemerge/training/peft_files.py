"""LoRA adapters of a mixture with linear experts, attached and saved so that PEFT loads them.

Shapes: E experts, r rank, D hidden size, F intermediate size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.files import WEIGHTS_SUFFIX
from moemerge.mixture import Moe, is_plain, name_in_files
from moemerge.output import writing

if TYPE_CHECKING:
    import torch


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")


def attach(model: Any, rank: int, alpha: float, embeddings: bool, dtype: torch.dtype) -> Any:
    """Add a LoRA to every linear but routers and gates; returns PEFT's model.

    With `embeddings`, embeddings and head are trained whole, in float32, because bfloat16 rounds
    small steps away. Tied ones stay tied.
    """
    from peft import LoraConfig, get_peft_model

    tied = bool(model.config.tie_word_embeddings)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_linears(model),
        modules_to_save=["embed_tokens", "lm_head"][: 2 - tied] if embeddings else None,
        ensure_weight_tying=embeddings and tied,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    if embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in module.modules_to_save.parameters():
                parameter.data = parameter.data.float()
        model.get_input_embeddings().register_forward_hook(lambda _, __, made: made.to(dtype))
    return wrapped


def save(wrapped: Any, moe: Moe, adapter: Path, dtype: torch.dtype) -> None:
    """Write the adapter with the tensor names of the mixture's files; whole modules in its dtype.

    A tied head is written too; without it PEFT does not load the embeddings.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = wrapped.peft_config["default"]
    state = {
        name_in_files(name, moe): value if ".lora_" in name else value.to(dtype, copy=True)
        for name, value in get_peft_model_state_dict(wrapped).items()
    }
    stacked = moe.tensors.stacked or moe.reading.stacks_adapters
    names, parameters = set(), set()
    for name in wrapped.base_model.targeted_module_names:
        leaf, own = name.rpartition(".")[2], ".experts." in name
        if own and stacked:
            parameters |= {"experts.gate_up_proj", "experts.down_proj"}
        elif leaf in moe.tensors.matrices and not own:
            parameters.add(".".join(name.split(".")[-2:]) + ".weight")
        else:
            names.add(leaf)
    if stacked:
        state = _stacked(state, moe)
        config.rank_pattern = {r"experts\.gate_up_proj": 2 * config.r}
        config.alpha_pattern = {r"experts\.gate_up_proj": 2 * config.lora_alpha}
    config.target_modules, config.target_parameters = names, parameters or None
    config.base_model_name_or_path = moe.text
    config.inference_mode = True
    state = {name: value.contiguous() for name, value in state.items()}
    with writing(adapter):
        save_file(state, adapter / f"adapter_model{WEIGHTS_SUFFIX}", metadata={"format": "pt"})
        config.save_pretrained(str(adapter))


def _linears(model: Any) -> list[str]:
    import torch

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and is_plain(name) and ".layers." in name
    ]


def _stacked(state: dict[str, torch.Tensor], moe: Moe) -> dict[str, torch.Tensor]:
    """Adapters of single experts in PEFT's form for stacked experts: A (E * r, in), B (out, r * E).

    There, gate and up are one matrix. Its adapter has the sum of both ranks, and B (2F, 2r) is
    block-diagonal. PEFT's wrapper of gate and up is inside the wrapper of down.
    """
    import torch

    made: dict[str, torch.Tensor] = {}
    apart: dict[str, dict[tuple[int, str, str], torch.Tensor]] = {}
    for name, value in state.items():
        if found := _EXPERT.fullmatch(name):
            own = apart.setdefault(found[1], {})
            own[int(found[2]), found[3], found[4]] = value
        else:
            made[name] = value
    gate, up, down = moe.tensors.matrices
    for place, own in apart.items():
        for where, parts in ((f"{place}.base_layer", (gate, up)), (place, (down,))):
            each = range(moe.experts)
            rows = [own[expert, part, "A"] for expert in each for part in parts]
            block: Any = torch.block_diag
            columns = [block(*(own[expert, part, "B"] for part in parts)) for expert in each]
            made[f"{where}.lora_A.weight"] = torch.cat(rows)
            made[f"{where}.lora_B.weight"] = torch.stack(columns, dim=-1).flatten(1)
    return made
