"""How much memory a merge will take at its peak, from the plan alone.

The constants were measured (`scripts/bench_memory.py`): what Python and torch hold with no work.
"""

from __future__ import annotations

from moemerge import recipe
from moemerge.dense import model_bytes
from moemerge.disk import CHUNK_BYTES
from moemerge.options import Options
from moemerge.prepare import Prepared
from moemerge.router_inputs import BATCH_TOKENS

PLAIN = 60_000_000
"""A process that copies bytes."""

WITH_PROMPTS = 30_000_000
"""The base model's tokenizer."""

WITH_TORCH = 310_000_000
"""A process that computes with torch."""

WITH_TRANSFORMERS = 440_000_000
"""A process that runs a model."""

_SCRATCH = 8 * recipe.BLOCK_VALUES * 4


def expected_peak(ready: Prepared, options: Options) -> int:
    """Bytes of resident memory that a merge of this plan is expected to reach.

    Writing takes a buffer for each thread, whatever the models' size; hidden gates take one decoder
    layer with `lazy`, two without, and the activations of the largest batch.
    """
    plan, config = ready.plan, ready.base.model.config
    sources = {text: opened.tensors for text, opened in ready.checkpoints.items()}
    tensors = [tensor for shard in plan.shards[1:] for tensor in shard.tensors]
    computes = any(recipe.computes(t.recipe) for t in tensors)
    copies = all(recipe.is_copy(t.recipe, t.dtype, sources) for t in tensors)
    buffers = options.threads * (CHUNK_BYTES + (0 if copies else _SCRATCH))
    buffers = min(buffers, plan.nbytes)
    if "experts" in ready.gate.USES and not options.lazy:
        dense = max(model_bytes(donor.model.tensors.values()) for donor in ready.donors)
        return WITH_TRANSFORMERS + int(max(dense, buffers))
    if "model" not in ready.gate.USES:
        tokenizer = WITH_PROMPTS if "prompts" in ready.gate.USES else 0
        return (WITH_TORCH if computes else PLAIN) + tokenizer + buffers
    tensors_of_base = ready.base.model.tensors.items()
    layer = sum(at.nbytes for name, at in tensors_of_base if name.startswith("model.layers.0."))
    held = layer if options.lazy else 2 * layer
    prompts = [prompt for expert in ready.prompts for prompt in expert.own + expert.negative]
    tokens = min(sum(len(prompt.ids) for prompt in prompts), BATCH_TOKENS)
    wide = 3 * config["intermediate_size"] + 8 * config["hidden_size"]
    running = held + 4 * tokens * wide
    return WITH_TRANSFORMERS + int(max(running, buffers))
