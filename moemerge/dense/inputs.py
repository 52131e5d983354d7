"""The routers' inputs at each layer, while a model with the mixture's body reads texts.

A router's input is what its class declares (`Body.sees`), mostly the MLP's input. All texts go
through one layer before the next layer, so that each weight is read once and memory for one layer
is enough. Neither the head nor logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from moemerge.dense.body import Body
from moemerge.dense.entering import Passage
from moemerge.dense.lane import ROUTER, Lane
from moemerge.options import RunOptions
from moemerge.plan import Sources
from moemerge.reporting import Reporter

if TYPE_CHECKING:
    from moemerge.dense.lane import Matrix, Weights


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
    import torch

    lane = Lane(body, sources, passages, options)
    # Memory of finished layers, used again for later layers.
    memory: list[Weights] = [{}] if options.lazy else [{}, {}]
    several = len(lane.donors) > 1  # then each donor's MLPs are read in turn

    def load(layer: int) -> Weights:
        again = memory[layer % len(memory)]
        return lane.load(layer, lane.donors[0], again, mlp=not several)

    total = len(lane.layers) * sum(len(batch) for _, batch in lane.batches)
    with (
        torch.inference_mode(),
        reporter.progress("texts through the layers", total, "text") as advance,
    ):
        for number, weights in enumerate(_in_turn(load, lane.layers, options.lazy)):
            seen: dict[str, dict[int, Matrix]] = {module: {} for module in modules}
            of_mlp: Weights = {}
            for donor in lane.donors:
                if several:
                    weights |= lane.load(number, donor, of_mlp, rest=False)
                for count in lane.step(number, weights, donor, seen):
                    advance(count)
            weights.clear()
            if lane.record.width(lane.config, number):
                yield {
                    module: [found[at] for at in range(len(passages))]
                    for module, found in seen.items()
                }


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
