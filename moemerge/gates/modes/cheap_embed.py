"""cheap_embed: the prompts' mean token embedding, the same in every layer; no model runs."""

from __future__ import annotations

from moemerge.dense import embed
from moemerge.gates.fitting import contrast, examples_of
from moemerge.gates.needs import Needs, Prompts
from moemerge.gates.task import Routers, Task

NEEDS = Needs(prompts=Prompts.REQUIRED)


def routers(task: Task) -> Routers:
    """(E, D) for each layer, unit rows: positive minus negative prompts' mean token embeddings.

    The idea is mergekit's `cheap_embed`. A router's real input is not an embedding, but this mode
    needs no pass of a model.
    """
    import numpy as np

    examples = examples_of(task.experts)
    texts = [x.prompt.ids[x.prompt.own :] for x in examples]
    table = embed(task.body, task.sources, sorted({token for text in texts for token in text}))
    vectors = [np.mean([table[token] for token in text], axis=0) for text in texts]
    return Routers([contrast(examples, vectors, "in every layer")] * len(task.names))
