"""Dense models in transformers with tensors from recipes: one layer of a model, or all of it."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import PLAIN, QUANTISED, Location
from moemerge.families import ATTENTION, EMBEDDING, HEAD, LAYER, PARTIAL, TRAINED, Family, record_of
from moemerge.options import RunOptions
from moemerge.plan import Recipe, Sources, arithmetic, recipe

if TYPE_CHECKING:
    import torch


_BEYOND_DEFAULTS = (
    "model_type", "head_dim", "rope_scaling", "rope_parameters", TRAINED, PARTIAL
)  # fmt: skip


def available_memory() -> int | None:
    """The bytes of memory available for a new model; None where the system does not say."""
    with suppress(OSError, IndexError, ValueError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def model_bytes(tensors: Collection[Location]) -> int:
    """The bytes of memory that `whole_model` needs for these tensors."""
    as_held = {"F16": "F32"}  # CPUs have no float16 arithmetic
    return sum(PLAIN[as_held.get(at.dtype, at.dtype)].nbytes(math.prod(at.shape)) for at in tensors)


def pick_device(name: str) -> str:
    """The device that `auto` means on this machine; any other name is returned unchanged."""
    import torch

    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_dtype(embedding: Recipe, sources: Sources, device: str) -> torch.dtype:
    """The dtype to compute in: the stored dtype, but float32 for float16 on a CPU, and bfloat16 for
    what is stored in ggml's blocks.

    CPUs have no float16 arithmetic.
    """
    import torch

    read = next(recipe.reads(embedding))
    at = sources[read.source][read.tensor]
    stored = "BF16" if at.encoding.name in QUANTISED else at.dtype
    if stored == "F16" and device != "cpu":
        return torch.float16
    return torch.bfloat16 if stored == "BF16" else torch.float32


def load_tensors(
    names: Collection[str],
    prefix: str,
    recipe_of: Callable[[str], Recipe],
    sources: Sources,
    dtype: torch.dtype,
    record: Family,
    memory: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors `prefix + name` in `dtype`; returns them by name, without the prefix.

    Names are those of the class of the family `record`. `memory` holds the tensors of an earlier
    call for a layer of the same shapes; their memory is used again.

    Raises:
        ReadError: a source is truncated or changed, or a value is NaN or Inf.
    """
    memory = {} if memory is None else memory
    for name in names:
        made = _recipe(prefix + name, recipe_of, record)
        shape = recipe.shape_of(made, sources)
        memory[name] = arithmetic.load(prefix + name, shape, made, sources, into=memory.get(name))
    return {name: memory[name].to(dtype) for name in names}


def _recipe(name: str, recipe_of: Callable[[str], Recipe], record: Family) -> Recipe:
    """The recipe of a tensor of transformers' class; a fused tensor is joined from its parts."""
    head, _, leaf = name.rpartition(".")
    for whole, parts in record.fused.items():
        if head.endswith(f".{whole}"):
            own = (f"{head.removesuffix(whole)}{part}.{leaf}" for part in parts)
            made = tuple(recipe_of(one) for one in own)
            return recipe.Join(made) if len(made) > 1 else made[0]
    return recipe_of(name)


def family_of(config: dict[str, Any]) -> Family:
    """The record of the family whose class `body_of` and `whole_model` build."""
    record = record_of(config)
    assert record  # a donor's model is of a known family
    return record


def body_of(config: dict[str, Any]) -> Any:
    """Transformers' body, of which nothing has memory except the rotary embedding."""
    from transformers import AutoModel

    return _on_meta(AutoModel, settings_of(config))


def whole_body_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """Transformers' body of a model that sees, and its language part; see `body_of`."""
    from transformers import AutoModel

    wrapper = dict(config["wrapper"])
    for key in ("dtype", "torch_dtype"):
        wrapper.pop(key, None)
    outer = _on_meta(AutoModel, {**wrapper, "text_config": settings_of(config)})
    return outer, outer.language_model


def whole_model(
    config: dict[str, Any],
    recipe_of: Callable[[str], Recipe],
    sources: Sources,
    options: RunOptions,
) -> Any:
    """The dense causal model in transformers with the tensors of `recipe_of`.

    With `options.lazy` a decoder layer's weights are read each time the layer runs, and then freed.

    Raises:
        ReadError: a source is truncated or changed, or a value is NaN or Inf.
    """
    from transformers import AutoModelForCausalLM

    device = pick_device(options.device)
    dtype = compute_dtype(recipe_of(EMBEDDING), sources, device)
    model = _on_meta(AutoModelForCausalLM, settings_of(config))
    record = family_of(config)

    def load(names: Collection[str], prefix: str = "") -> dict[str, torch.Tensor]:
        made = load_tensors(names, prefix, recipe_of, sources, dtype, record)
        return {name: tensor.to(device) for name, tensor in made.items()}

    def fill(number: int, layer: Any) -> None:
        made = load(list(layer.state_dict()), LAYER.format(layer=number))
        layer.load_state_dict(made, assign=True)

    tied = config["tie_word_embeddings"]
    beside = [EMBEDDING, *record.top(config), *([] if tied else [HEAD])]
    top = {record.name_in_class(name): tensor for name, tensor in load(beside).items()}
    embedding = record.name_in_class(EMBEDDING)
    model.load_state_dict(top | ({HEAD: top[embedding]} if tied else {}), assign=True, strict=False)
    place_buffers(model, device)
    for number, layer in enumerate(model.model.layers):
        if options.lazy:
            Streamed(layer, partial(fill, number))
        else:
            fill(number, layer)
    return model


class Streamed:
    """A decoder layer that has its weights in memory only while it runs."""

    def __init__(self, layer: Any, fill: Callable[[Any], None]):
        self.layer, self.fill, self.own = layer, fill, layer.forward
        layer.streamed, layer.forward = self, self.run

    @contextmanager
    def filled(self) -> Iterator[Callable[..., Any]]:
        """Load the weights, yield the layer's forward for any number of calls, and free them."""
        self.fill(self.layer)
        try:
            yield self.own
        finally:
            self.layer.to("meta")

    @contextmanager
    def replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Use `forward` in place of the layer's forward within the block."""
        self.layer.forward = forward
        try:
            yield
        finally:
            self.layer.forward = self.run

    def run(self, *args: Any, **named: Any) -> Any:
        """Run the layer once; its weights are loaded before and freed afterwards."""
        with self.filled() as forward:
            return forward(*args, **named)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json that describe the model, without those of its training."""
    record = family_of(config)
    without = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if record.layers != ATTENTION:
        return {key: config[key] for key in config["said"]} | without | {"model_type": record.name}
    settings = {key: config[key] for key in (*record.defaults, *_BEYOND_DEFAULTS) if key in config}
    settings["vocab_size"] = config["vocab_size"]
    if record.interleaved:
        settings["model_type"] = record.name
    elif config[PARTIAL] != 1:  # a mistral has no partial rotary embedding
        settings["model_type"] = config["saved_as"]
        if scaling := settings["rope_scaling"]:  # phi3 in transformers 4: three keys only
            factors = {key: scaling[key] for key in scaling if key.endswith("_factor")}
            settings["rope_scaling"] = {"type": scaling["rope_type"], **factors}
    return settings | without


def _on_meta(kind: Any, settings: dict[str, Any]) -> Any:
    """A model without memory, except buffers that no file holds: those of the rotary embedding."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.for_model(**copy.deepcopy(settings))  # for_model changes it
    with torch.device("meta"):
        model = kind.from_config(config)
    make_buffers(model, config)
    return model.eval()


def make_buffers(model: Any, config: Any) -> None:
    """Make the buffers of a model on the meta device that no file holds, on the CPU."""
    import torch

    body = getattr(model, "model", model)
    if hasattr(body, "language_model"):
        body, config = body.language_model, config.text_config
    for name, module in list(body.named_modules()):
        if name.startswith("layers."):
            continue
        if hasattr(module, "scalar_embed_scale"):  # a scaled embedding's factor
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
        elif hasattr(module, "rope_type"):
            own = getattr(module, "config", config)
            body.set_submodule(name, type(module)(config=own))


def place_buffers(model: Any, device: str) -> None:
    """Move the buffers that `make_buffers` made to the device."""
    for path, module in getattr(model, "model", model).named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if path.startswith("layers."):
                continue
            if not buffer.is_meta:
                setattr(module, name, buffer.to(device))


def quantise(module: torch.nn.Module, four_bits: bool) -> None:
    """Replace each linear layer by bitsandbytes' 4-bit (NF4) or 8-bit one.

    The weights are quantised when the module is moved to a GPU.
    """
    import bitsandbytes as bnb
    import torch

    for name, child in list(module.named_children()):
        if not isinstance(child, torch.nn.Linear):
            quantise(child, four_bits)
            continue
        new: Any
        if four_bits:
            new = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=child.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            new.weight = bnb.nn.Params4bit(child.weight, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                has_fp16_weights=False,
                device="meta",
            )
            new.weight = bnb.nn.Int8Params(
                child.weight, requires_grad=False, has_fp16_weights=False
            )
        new.bias = child.bias
        setattr(module, name, new)
