"""The routers' inputs at each layer, while a model with the mixture's body reads texts.

A router's input is what its class declares (`Body.sees`), mostly the MLP's input. All texts go
through one layer before the next layer, so that each weight is read once and memory for one layer
is enough. Neither the head nor logits are computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from moemerge.architectures import RouterInput
from moemerge.checkpoint import Donor
from moemerge.dense.body import Body
from moemerge.dense.entering import Passage, entered
from moemerge.dense.run import (
    body_of,
    compute_dtype,
    family_of,
    load_tensors,
    pick_device,
    quantise,
    whole_body_of,
)
from moemerge.errors import RunError
from moemerge.families import EMBEDDING, LAYER, Family
from moemerge.options import RunOptions
from moemerge.plan import Recipe, Sources, recipe
from moemerge.reporting import Reporter
from moemerge.text import batching

if TYPE_CHECKING:
    import numpy as np
    import torch

    Matrix = np.ndarray[Any, np.dtype[np.float32]]
    Weights = dict[str, torch.Tensor]

ROUTER = "router"
"""In place of a module's name: what the mixture's router sees."""

_MLP = "mlp."


def router_inputs(
    body: Body,
    sources: Sources,
    passages: Sequence[Passage],
    options: RunOptions,
    reporter: Reporter,
) -> Iterator[list[Matrix]]:
    """Yield for each layer the router's inputs at each passage's own tokens: a list of (T, D)."""
    for seen in layer_inputs((ROUTER,), body, sources, passages, options, reporter):
        yield seen[ROUTER]


def layer_inputs(
    modules: Sequence[str],
    body: Body,
    sources: Sources,
    passages: Sequence[Passage],
    options: RunOptions,
    reporter: Reporter,
) -> Iterator[dict[str, list[Matrix]]]:
    """Yield for each layer the inputs of each of its `modules`: a list by module name.

    Each list has one matrix per passage, with the rows of the passage's own tokens. A module has
    its usual name; `ROUTER` is the router's input (T, D). The input of `mlp.down_proj` is the
    activations (T, F). A layer without an MLP yields nothing.

    With `options.lazy` the weights of one layer are in memory at a time. Otherwise there are two
    layers, because the next one is read while one computes. The values are the same, bit for bit.

    Raises:
        RunError: a layer gives NaN or Inf; names the model and the layer.
        ReadError: an embedding row of the texts' tokens holds NaN or Inf.
    """
    import numpy as np
    import torch

    device = pick_device(options.device)
    config = body.base.model.config
    record = family_of(config)
    dtype = compute_dtype(body.recipe(EMBEDDING), sources, device)
    donors = list({id(passage.mlps): passage.mlps for passage in passages}.values())
    batches = [(donor, batch) for donor in donors for batch in _batches(passages, donor)]
    sees = any(passage.prompt.seen for passage in passages)
    outer, model = whole_body_of(config) if sees else (body_of(config),) * 2
    calls = entered(outer, model, body, sources, passages, [b for _, b in batches], dtype, device)
    del outer
    states = [call.state for call in calls]
    layers = range(config["num_hidden_layers"])
    # Memory of finished layers, used again for later layers.
    memory: list[Weights] = [{}] if options.lazy else [{}, {}]
    several = len(donors) > 1  # then each donor's MLPs are read in turn
    of_mlp_prefix = f"{record.path('mlp')}."

    def names_of(layer: int, mlp: bool) -> list[str]:
        names = model.layers[layer].state_dict().keys()
        return [name for name in names if name.startswith(of_mlp_prefix) == mlp]

    named = [(names_of(layer, False), names_of(layer, True)) for layer in layers]

    def load(layer: int) -> Weights:
        rest, mlp = named[layer]
        wanted = rest if several else [*rest, *mlp]
        prefix, recipe_of = LAYER.format(layer=layer), _through(body, donors[0])
        again = memory[layer % len(memory)]
        return load_tensors(wanted, prefix, recipe_of, sources, dtype, record, again)

    total = len(layers) * sum(len(batch) for _, batch in batches)
    with (
        torch.inference_mode(),
        reporter.progress("texts through the layers", total, "text") as advance,
    ):
        for number, weights in enumerate(_in_turn(load, layers, options.lazy)):
            seen: dict[str, dict[int, Matrix]] = {module: {} for module in modules}
            of_mlp: Weights = {}
            for donor in donors:
                if several:
                    prefix, recipe_of = LAYER.format(layer=number), _through(body, donor)
                    mlp = named[number][1]
                    weights |= load_tensors(mlp, prefix, recipe_of, sources, dtype, record, of_mlp)
                layer = copy.deepcopy(model.layers[number])
                _fill(layer, weights, device, options)
                for at, (whose, batch) in enumerate(batches):
                    if whose is donor:
                        with _noted(layer, record, body.sees, passages, batch, seen):
                            states[at] = calls[at].run(number, layer, states[at])
                        if not states[at].isfinite().all():
                            given = seen.get(ROUTER, {})
                            own = all(np.isfinite(given[n]).all() for n in batch if n in given)
                            raise _overflow(donor if donor and own else body.base, number)
                        advance(len(batch))
                del layer  # free it before the next one is read
            weights.clear()
            if record.width(config, number):
                yield {
                    module: [found[at] for at in range(len(passages))]
                    for module, found in seen.items()
                }


def _overflow(donor: Donor, layer: int) -> RunError:
    return RunError(
        f"{donor.name} ({donor.model.reference.text}): layer {layer} gives NaN or Inf on "
        "these texts; use another dtype of it, other prompts, or --device cpu"
    )


def _through(body: Body, donor: Donor | None) -> Callable[[str], Recipe]:
    """The recipes of the body's dense model with a donor's MLPs."""

    def recipe_of(tensor: str) -> Recipe:
        of_mlp = f".{_MLP}" in tensor
        return recipe.of_donor(donor, tensor) if donor and of_mlp else body.recipe(tensor)

    return recipe_of


def _batches(passages: Sequence[Passage], donor: Donor | None) -> list[list[int]]:
    """The numbers of the passages that pass the donor's MLPs, in batches; one with a picture is a
    batch of its own."""
    own = [number for number, passage in enumerate(passages) if passage.mlps is donor]
    alone = [[number] for number in own if passages[number].prompt.seen]
    own = [number for number in own if not passages[number].prompt.seen]
    lengths = [len(passages[number].prompt.ids) for number in own]
    return [*([own[at] for at in batch] for batch in batching.batches(lengths)), *alone]


def _in_turn(load: Callable[[int], Weights], layers: range, lazy: bool) -> Iterator[Weights]:
    """Yield each layer's weights in order; unless `lazy`, the next layer is read meanwhile."""
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


def _fill(layer: Any, weights: Weights, device: str, options: RunOptions) -> None:
    """Give a layer its weights on the device, quantised if asked."""
    layer.load_state_dict(weights, assign=True)
    if options.load_in_4bit or options.load_in_8bit:
        quantise(layer, options.load_in_4bit)
    layer.to(device)


@contextmanager
def _noted(
    layer: Any,
    record: Family,
    sees: RouterInput,
    passages: Sequence[Passage],
    batch: list[int],
    seen: dict[str, dict[int, Matrix]],
) -> Iterator[None]:
    """Add the inputs of `seen`'s modules to `seen` while a batch runs through the layer."""

    def note(
        found: dict[int, Matrix], unit: bool, module: object, args: Any, named: Mapping[str, Any]
    ) -> None:
        given = args[0] if args else named["hidden_states"]
        inputs = given.float()
        if unit:
            inputs = inputs * inputs.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        made = inputs.cpu().numpy()
        for row, number in enumerate(batch):
            prompt = passages[number].prompt
            found[number] = made[row, prompt.own : len(prompt.ids)].copy()

    hooks = []
    for name, found in seen.items():
        module = record.path(sees.module if name == ROUTER else name)
        unit = sees.unit and name == ROUTER
        if _has(layer, module):
            noted = partial(note, found, unit)
            hooks.append(
                layer.get_submodule(module).register_forward_pre_hook(noted, with_kwargs=True)
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _has(layer: Any, module: str) -> bool:
    """Whether the layer has the module; a layer without an MLP lacks some."""
    return any(name == module for name, _ in layer.named_modules())
