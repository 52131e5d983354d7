"""cheap_embed: the prompts' mean token embedding, the same in every layer; no model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.gates import Task
from moemerge.gates.hidden_avg import contrast
from moemerge.router_inputs import embed

if TYPE_CHECKING:
    from moemerge.gates import Matrix
    from moemerge.gates.hidden_avg import Vector
    from moemerge.prompts import Prompt

USES = frozenset({"prompts"})


def routers(task: Task) -> list[Matrix]:
    """(E, D) per layer, unit rows: positive minus negative prompts' mean token embeddings.

    The idea is mergekit's `cheap_embed`; a router sees something else, but it costs nothing.
    """
    import numpy as np

    prompts = [prompt for expert in task.experts for prompt in expert.positive + expert.negative]
    table = embed(task.base, task.sources, sorted({i for p in prompts for i in p.ids[p.own :]}))

    def mean(prompt: Prompt) -> Vector:
        vector: Vector = np.mean([table[i] for i in prompt.ids[prompt.own :]], axis=0)
        return vector

    return [contrast(task.experts, mean, "in every layer")] * len(task.names)
