"""Texts on their way through a model, one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from moemerge.families import EMBEDDING, HEAD, LAYER, Family
from moemerge.options import RunOptions
from moemerge.plan import Recipe, Sources, arithmetic, recipe
from moemerge.text import batching

if TYPE_CHECKING:
    import numpy as np
    import torch

    Matrix = np.ndarray[Any, np.dtype[np.float32]]
    Weights = dict[str, torch.Tensor]

ROUTER = "router"
"""In place of a module's name: what the mixture's router sees."""

_MLP = "mlp."
_LOGITS, _FEWEST_ROWS = 1 << 24, 1 << 10


class Lane:
    """Texts that go through a body and, each, the MLPs of its passage's donor.

    `states` are the residual streams (B, T, D) of the batches after the layers that have run, with
    `batches` of passages' numbers, each with its donor. `donors` are all of these.
    """

    def __init__(
        self, body: Body, sources: Sources, passages: Sequence[Passage], options: RunOptions
    ):
        self.body, self.sources, self.passages, self.options = body, sources, passages, options
        self.config = body.base.model.config
        self.record = family_of(self.config)
        self.device = pick_device(options.device)
        self.dtype = compute_dtype(body.recipe(EMBEDDING), sources, self.device)
        self.donors = list({id(passage.mlps): passage.mlps for passage in passages}.values())
        self.batches = [
            (donor, batch) for donor in self.donors for batch in _batches(passages, donor)
        ]
        sees = any(passage.prompt.seen for passage in passages)
        outer, self.model = whole_body_of(self.config) if sees else (body_of(self.config),) * 2
        batches = [batch for _, batch in self.batches]
        self.calls = entered(
            outer, self.model, body, sources, passages, batches, self.dtype, self.device
        )
        self.states = [call.state for call in self.calls]
        self._places = {
            number: (at, row)
            for at, (_, batch) in enumerate(self.batches)
            for row, number in enumerate(batch)
        }
        self.layers = range(self.config["num_hidden_layers"])
        self._of_mlp = f"{self.record.path('mlp')}."

    def load(
        self, layer: int, donor: Donor | None, memory: Weights, rest: bool = True, mlp: bool = True
    ) -> Weights:
        """A layer's weights by their names in the layer: its MLP's are the donor's.

        `memory` holds the tensors of an earlier call; it is used again.
        """
        names = [
            name
            for name in self.model.layers[layer].state_dict()
            if (mlp if name.startswith(self._of_mlp) else rest)
        ]
        prefix, recipe_of = LAYER.format(layer=layer), _through(self.body, donor)
        return load_tensors(names, prefix, recipe_of, self.sources, self.dtype, self.record, memory)

    def step(
        self,
        number: int,
        weights: Weights,
        donor: Donor | None,
        seen: dict[str, dict[int, Matrix]],
        whole: bool = False,
    ) -> Iterator[int]:
        """Run a donor's batches through a layer; yields each batch's size.

        The inputs of `seen`'s modules are added to it, by passage: the rows of the passage's own
        tokens, or of all its tokens if `whole`. A module has its usual name; `ROUTER` is the
        router's input.

        Raises:
            RunError: the layer gives NaN or Inf; names the model and the layer.
        """
        import numpy as np

        layer = copy.deepcopy(self.model.layers[number])
        _fill(layer, weights, self.device, self.options)
        for at, (whose, batch) in enumerate(self.batches):
            if whose is donor:
                with _noted(layer, self.record, self.body.sees, self.passages, batch, seen, whole):
                    self.states[at] = self.calls[at].run(number, layer, self.states[at])
                if not self.states[at].isfinite().all():
                    given = seen.get(ROUTER, {})
                    own = all(np.isfinite(given[n]).all() for n in batch if n in given)
                    raise _overflow(donor if donor and own else self.body.base, number)
                yield len(batch)

    def state_of(self, number: int) -> torch.Tensor:
        """A passage's state (T, D), in float32 on the CPU."""
        at, row = self._places[number]
        own = self.states[at][row, : len(self.passages[number].prompt.ids)]
        return own.float().cpu()

    def add_to_state(self, number: int, change: torch.Tensor) -> None:
        """Add (T, D) to a passage's state."""
        at, row = self._places[number]
        state = self.states[at]
        state[row, : len(change)] += change.to(state.device, state.dtype)

    def losses(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The loss (T) in nats of each token `ids` (T), from the last layer's states (T, D) before
        it. The head is read in blocks of rows."""
        import torch

        tied = self.config["tie_word_embeddings"]
        of = self.body.recipe(EMBEDDING if tied else HEAD)
        rows, _ = recipe.shape_of(of, self.sources)
        normed = self.model.norm(states.to(self.device, self.dtype)).float().cpu()
        normed = normed / float(self.config.get("logits_scaling", 1.0))
        every, own = torch.full((len(ids),), -torch.inf), torch.zeros(len(ids))
        step = max(_FEWEST_ROWS, _LOGITS // max(len(ids), 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = recipe.Cut(of, 0, start, stop)
            shape = recipe.shape_of(part, self.sources)
            head = arithmetic.load(HEAD, shape, part, self.sources).float()
            logits = normed @ head.T
            every = torch.logaddexp(every, logits.logsumexp(1))
            here = (ids >= start) & (ids < stop)
            own[here] = logits[here, ids[here] - start]
        return every - own


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
    whole: bool,
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
            first = 0 if whole else prompt.own
            found[number] = made[row, first : len(prompt.ids)].copy()

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
