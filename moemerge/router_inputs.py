"""What each layer's router will see while the base model reads some text.

That is the output of the layer's post-attention norm, in the base model: the MoE's body. The model
is run layer by layer, all prompts through one layer before the next, so that each weight is read
once and one layer at a time can be enough. Neither head nor logits are ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from moemerge import recipe
from moemerge.checkpoint import Donor, read_rows
from moemerge.checkpoint.model_config import DEFAULTS
from moemerge.options import Options
from moemerge.prompts import Prompt
from moemerge.recipe import Sources
from moemerge.reporting import Reporter

if TYPE_CHECKING:
    import numpy as np
    import torch

    Matrix = np.ndarray[Any, np.dtype[np.float32]]

BATCH_TOKENS = 2048
"""The most tokens a batch holds, padding included: bounds what activations cost."""

_EMBEDDING = "model.embed_tokens.weight"
_LAYER = "model.layers.{layer}."
_BEYOND_DEFAULTS = ("model_type", "head_dim", "rope_scaling", "rope_parameters")


def router_inputs(
    base: Donor, sources: Sources, prompts: list[Prompt], options: Options, reporter: Reporter
) -> Iterator[list[Matrix]]:
    """Yield, for each layer, what its router sees at each prompt's own tokens: (T, D) per prompt.

    With `options.lazy` one layer's weights are in memory at a time; without, two: the next is read
    while one computes. The values are the same, bit for bit.
    """
    import torch

    device = pick_device(options.device)
    config = base.model.config
    dtype = _compute_dtype(base, sources, device)
    batches = _batches(prompts)
    states = _embed_batches(base, sources, prompts, batches, dtype, device)
    layers = range(config["num_hidden_layers"])
    names = _body(config).layers[0].state_dict().keys()

    # Of a layer that is done, used again for one to come.
    memory: list[dict[str, torch.Tensor]] = [{}] if options.lazy else [{}, {}]

    def load(layer: int) -> dict[str, torch.Tensor]:
        again = memory[layer % len(memory)]
        return _layer_weights(base, sources, _LAYER.format(layer=layer), names, dtype, again)

    with (
        torch.inference_mode(),
        reporter.progress("prompts through the base model", len(layers), "layer") as advance,
    ):
        for weights in _in_turn(load, layers, options.lazy):
            body = _one_layer(config, weights, device, options)
            weights.clear()
            seen: dict[int, Matrix] = {}
            for batch, state in zip(batches, states, strict=True):
                _run(body, prompts, batch, state, seen)
            del body  # before the next layer is read
            advance(1)
            yield [seen[number] for number in range(len(prompts))]


def embed(base: Donor, sources: Sources, ids: list[int]) -> dict[int, Matrix]:
    """The embedding (D) of each token id; only these rows are read."""
    read = next(recipe.reads(recipe.of_donor(base, _EMBEDDING)))
    rows = read_rows(sources[read.source][read.tensor], ids)
    return dict(zip(ids, rows, strict=True))


def pick_device(name: str) -> str:
    """The device that `auto` means here; any other name is itself."""
    import torch

    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _compute_dtype(base: Donor, sources: Sources, device: str) -> torch.dtype:
    """The weights' own dtype; float32 for float16 on a CPU, which has no arithmetic for it."""
    import torch

    read = next(recipe.reads(recipe.of_donor(base, _EMBEDDING)))
    stored = sources[read.source][read.tensor].dtype
    if stored == "F16" and device != "cpu":
        return torch.float16
    return torch.bfloat16 if stored == "BF16" else torch.float32


def _batches(prompts: list[Prompt]) -> list[list[int]]:
    """Prompt numbers in batches of like length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number].ids), number))
    batches: list[list[int]] = []
    for number in order:
        fits = batches and (len(batches[-1]) + 1) * len(prompts[batches[-1][0]].ids) <= BATCH_TOKENS
        if fits:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _embed_batches(
    base: Donor,
    sources: Sources,
    prompts: list[Prompt],
    batches: list[list[int]],
    dtype: torch.dtype,
    device: str,
) -> list[torch.Tensor]:
    """The residual stream before the first layer: (B, T, D) per batch, padded on the right."""
    import torch

    rows = embed(base, sources, sorted({number for prompt in prompts for number in prompt.ids}))
    states = []
    for batch in batches:
        length = len(prompts[batch[0]].ids)
        state = torch.zeros(len(batch), length, base.model.config["hidden_size"], dtype=dtype)
        for row, number in enumerate(batch):
            for at, token in enumerate(prompts[number].ids):
                state[row, at] = torch.from_numpy(rows[token])
        states.append(state.to(device))
    return states


def _in_turn(
    load: Callable[[int], dict[str, torch.Tensor]], layers: range, lazy: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Each layer's weights when it is its turn; the next one's read ahead unless `lazy`."""
    if lazy:
        yield from map(load, layers)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, layers[0])
        for layer in layers:
            weights = ahead.result()
            if layer + 1 in layers:
                ahead = pool.submit(load, layer + 1)
            yield weights


def _layer_weights(
    base: Donor,
    sources: Sources,
    prefix: str,
    names: Collection[str],
    dtype: torch.dtype,
    memory: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The layer's tensors by their `names` within it; others that a checkpoint may hold stay."""
    for name in names:
        memory[name] = recipe.load(
            prefix + name,
            base.model.tensors[prefix + name].shape,
            recipe.of_donor(base, prefix + name),
            sources,
            into=memory.get(name),
        )
    return {name: memory[name].to(dtype) for name in names}


def _one_layer(
    config: dict[str, Any], weights: dict[str, torch.Tensor], device: str, options: Options
) -> Any:
    """The body with this layer's weights in its place, on the device."""
    body = _body(config)
    body.layers[0].load_state_dict(weights, assign=True)
    if options.load_in_4bit or options.load_in_8bit:
        _quantise(body.layers[0], options.load_in_4bit)
    return body.to(device)


def _body(config: dict[str, Any]) -> Any:
    """transformers' own body with one decoder layer and no final norm.

    Built without memory on the meta device; only the rotary embedding is built for real, since its
    buffers are computed at construction and stand in no file. Of a config.json only what describes
    the model is passed on: the rest are wishes of the program that saved it.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    settings = {key: config[key] for key in (*DEFAULTS[config["model_type"]], *_BEYOND_DEFAULTS)}
    settings |= {"num_hidden_layers": 1, "vocab_size": 1}
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    one = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        body = AutoModel.from_config(one)
    body.rotary_emb = type(body.rotary_emb)(config=one)
    body.norm = torch.nn.Identity()
    body.embed_tokens = torch.nn.Identity()
    return body.eval()


def _quantise(module: torch.nn.Module, four_bits: bool) -> None:
    """Replace every linear by bitsandbytes' 4-bit (NF4) or 8-bit one; moving it quantises it."""
    import bitsandbytes as bnb
    import torch

    for name, child in list(module.named_children()):
        if not isinstance(child, torch.nn.Linear):
            _quantise(child, four_bits)
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


def _run(
    body: Any, prompts: list[Prompt], batch: list[int], state: torch.Tensor, seen: dict[int, Matrix]
) -> None:
    """Send a batch through the layer, in place; note what its MLP, and so a router, is given."""
    import torch

    lengths = torch.tensor([len(prompts[number].ids) for number in batch])
    mask = (torch.arange(state.shape[1]) < lengths[:, None]).long().to(state.device)

    def note(module: object, args: tuple[torch.Tensor, ...]) -> None:
        inputs = args[0].float().cpu().numpy()
        for row, number in enumerate(batch):
            prompt = prompts[number]
            seen[number] = inputs[row, prompt.own : len(prompt.ids)].copy()

    hook = body.layers[0].mlp.register_forward_pre_hook(note)
    try:
        state.copy_(
            body(inputs_embeds=state, attention_mask=mask, use_cache=False).last_hidden_state
        )
    finally:
        hook.remove()
