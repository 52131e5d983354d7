"""The costs of a merge, computed from its plan: memory, and bytes to download from the Hub.

The constants were measured (`scripts/bench_memory.py`): the memory of Python and torch at rest.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moemerge.dense import model_bytes
from moemerge.errors import InputError, Problem
from moemerge.gates import Prompts
from moemerge.options import Options, RunOptions
from moemerge.output import CHUNK_BYTES
from moemerge.plan import BLOCK_VALUES, ROUTERS, Read, recipe
from moemerge.prepare.records import Prepared
from moemerge.reporting import size
from moemerge.text import batching

PLAIN = 60_000_000
"""Bytes of memory of a process that copies bytes."""

WITH_PROMPTS = 30_000_000
"""Bytes of memory of the base model's tokenizer."""

WITH_TORCH = 310_000_000
"""Bytes of memory of a process that computes with torch."""

WITH_TRANSFORMERS = 440_000_000
"""Bytes of memory of a process that runs a model, without the model."""

_SCRATCH = 8 * BLOCK_VALUES * 4
_DELTA = 20
"""Bytes for each value of a LoRA's matrix A: as read, in float64, and on the grid of exact sums."""


@dataclass(frozen=True)
class Transfer:
    """The bytes that come from the Hub.

    Without --stream, whole files are downloaded into the cache: `files` bytes, in addition to the
    `cached` bytes that are there already. With --stream, only the needed `ranges` are read, from
    files of `sources` bytes in total. `whole` names the sources that can only be read as whole
    files.
    """

    files: int
    cached: int
    ranges: int
    sources: int
    whole: tuple[str, ...]


def transfer(ready: Prepared, options: RunOptions) -> Transfer:
    """The bytes that a merge of this plan reads from the models on the Hub."""
    reads = Counter(dict(_reads(ready, options)))
    files = cached = ranges = sources = 0
    whole = []
    for text, opened in ready.checkpoints.items():
        if opened.reference.directory:
            continue
        sources += sum(remote.size for remote in opened.absent.values())
        of_one = {read.tensor: times for read, times in reads.items() if read.source == text}
        for name in {opened.tensors[tensor].file.name for tensor in of_one}:
            if name in opened.absent:
                files += opened.absent[name].size
            else:
                folder = opened.gguf.path.parent if opened.gguf else opened.directory
                cached += (folder / name).stat().st_size
        remote = {t: n for t, n in of_one.items() if opened.tensors[t].file.name in opened.absent}
        if not opened.streams:
            whole.append(text)
        ranges += sum(times * opened.tensors[tensor].nbytes for tensor, times in remote.items())
    return Transfer(files, cached, ranges, sources, tuple(whole))


def check_cache_room(ready: Prepared, options: RunOptions, out: Path) -> None:
    """Check that the disk of the Hub's cache has room for the downloads.

    Raises:
        InputError: the disk has too little room.
    """
    needed = transfer(ready, options).files
    if not needed or options.stream:
        return
    from huggingface_hub import constants

    named = os.path.expanduser(options.cache_dir or constants.HF_HUB_CACHE)  # noqa: PTH111
    cache = _existing(Path(named))
    if cache.stat().st_dev == _existing(out.absolute()).stat().st_dev:
        needed += ready.plan.nbytes
    free = shutil.disk_usage(cache).free
    if needed > free:
        what = f"needs {size(needed)} for downloads and output, {size(free)} are free"
        fix = "pass --stream to keep no downloads, or --cache-dir on another disk"
        raise InputError([Problem(str(cache), what, fix)])


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _reads(ready: Prepared, options: RunOptions) -> Iterator[tuple[Read, int]]:
    """Each source tensor that is read, and how often."""
    times: Counter[Read] = Counter()
    for tensor in ready.plan.tensors:
        times.update(read for read in recipe.reads(tensor.recipe) if read.source != ROUTERS)
    layers = [name for name in ready.base.model.tensors if name.startswith("model.layers.")]
    needs, passes = ready.gate.needs, ready.gate.settings.passes()
    if needs.body_pass:
        for name in layers:
            if passes.own_mlps and ".mlp." in name:
                for donor in ready.donors:
                    times.update(recipe.reads(recipe.of_donor(donor, name)))
            else:
                times.update(recipe.reads(ready.body.recipe(name)))
    if needs.own_passes:
        for donor in ready.donors:  # once for its own model, once for the fit
            for name in layers:
                for read in recipe.reads(recipe.of_donor(donor, name)):
                    times[read] += 2
    if needs.expert_models:
        for donor in ready.donors:
            for name in donor.model.tensors:
                again = max(passes.tokens, 1) if options.lazy and name in layers else 1
                for read in recipe.reads(recipe.of_donor(donor, name)):
                    times[read] += again
    yield from times.items()


def expected_peak(ready: Prepared, options: Options) -> int:
    """The expected peak of resident memory of a merge of this plan, in bytes.

    Writing takes a buffer for each thread, which does not depend on the models' size. A gate mode
    that runs the body takes one decoder layer with `lazy`, otherwise two, and the activations of
    the largest batch.
    """
    plan, config = ready.plan, ready.base.model.config
    sources = {text: opened.tensors for text, opened in ready.checkpoints.items()}
    tensors = [tensor for shard in plan.shards[1:] for tensor in shard.tensors]
    computes = any(recipe.computes(t.recipe) for t in tensors)
    copies = all(recipe.is_copy(t.recipe, t.dtype, sources) for t in tensors)
    adapters = [donor.adapter for donor in (ready.base, *ready.donors) if donor.adapter]
    downs = [a.checkpoint.tensors[d.down].shape for a in adapters for d in a.deltas.values()]
    delta = _DELTA * max(map(math.prod, downs), default=0)
    buffers = options.threads * (CHUNK_BYTES + (0 if copies else _SCRATCH + delta))
    buffers = min(buffers, plan.nbytes)
    if ready.gate.needs.expert_models and not options.lazy:
        dense = max(model_bytes(donor.model.tensors.values()) for donor in ready.donors)
        return WITH_TRANSFORMERS + int(max(dense, buffers))
    if not ready.gate.needs.body_pass:
        tokenizer = 0 if ready.gate.needs.prompts is Prompts.NONE else WITH_PROMPTS
        return (WITH_TORCH if computes else PLAIN) + tokenizer + max(buffers, _slicing(ready))
    tensors_of_base = ready.base.model.tensors.items()
    layer = sum(at.nbytes for name, at in tensors_of_base if name.startswith("model.layers.0."))
    held = layer if options.lazy else 2 * layer
    prompts = [prompt for expert in ready.prompts for prompt in expert.own + expert.negative]
    tokens = min(sum(len(prompt.ids) for prompt in prompts), batching.BATCH_TOKENS)
    wide = 3 * config["intermediate_size"] + 8 * config["hidden_size"]
    running = held + 4 * tokens * wide + _slicing(ready) + _fitting(ready, layer)
    return WITH_TRANSFORMERS + int(max(running, buffers))


def _fitting(ready: Prepared, layer: int) -> int:
    """Bytes of memory of a fit: a layer's attention in float32 several times, and the texts' states
    and inputs of every expert's model and of the mixture."""
    if ready.fit is None:
        return 0
    config = ready.base.model.config
    tokens = sum(
        len(prompt.ids)
        for texts in ready.fit.texts
        for prompt in (*texts.body, *texts.aligned, *texts.held)
    )
    wide = 4 * config["hidden_size"] + config["intermediate_size"]
    return int(3 * layer + 4 * tokens * wide)


def _slicing(ready: Prepared) -> int:
    """Bytes of memory to cut a layer's MLP into slices.

    They are copies of the layer's activations on the text, or of its weights, in float32.
    """
    if ready.cutting is None:
        return 0
    config = ready.base.model.config
    tokens = sum(len(piece.ids) for piece in ready.cutting.text)
    of_weights = 3 * config["hidden_size"] if ready.cutting.split.assignment == "kmeans" else 0
    return int(4 * config["intermediate_size"] * max(5 * tokens, of_weights))
