"""A finished mixture loaded into transformers: whole if memory is large enough, or streamed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from moemerge.architectures import COUNTS, PER_TOKEN
from moemerge.dense import available_memory, pick_device
from moemerge.errors import Findings, InputError, Problem, first_line
from moemerge.files import CONFIG_FILE, WEIGHTS_SUFFIX
from moemerge.mixture.open import open_moe
from moemerge.mixture.unfused import dtype_of, load, refuse_weights
from moemerge.options import RunOptions
from moemerge.reporting import Reporter, size
from moemerge.text import Encoder


def load_mixture(out: Path, options: RunOptions, reporter: Reporter) -> Any:
    """The mixture in transformers, on its device.

    If memory is too small, or with `options.lazy`, the weights of a decoder layer are read each
    time the layer runs, and dropped after it.

    Raises:
        InputError: transformers cannot load the mixture, or leaves some weights out.
    """
    needed = sum(file.stat().st_size for file in out.glob(f"*{WEIGHTS_SUFFIX}"))
    free = available_memory()
    if options.lazy or (free is not None and needed > free):
        if not options.lazy:
            told = f"{size(needed)} of weights, {size(free or 0)} of memory free"
            reporter.say(f"{out}: {told}, so it is read layer by layer")
        return _streamed(out, options, reporter)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with reporter.progress("loading the mixture", 1, "model"):
        try:
            model, found = getattr(transformers, _auto_class(out)).from_pretrained(
                out, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:  # errors of many libraries reach this line
            what = f"transformers cannot load it ({first_line(error)})"
            fix = "name one that it loads; `moemerge verify` checks one that moemerge made"
            raise InputError([Problem(str(out), what, fix)]) from error
    keys = ("missing_keys", "mismatched_keys", "unexpected_keys")
    lost = ([one if isinstance(one, str) else one[0] for one in found[key]] for key in keys)
    refuse_weights(str(out), *lost)
    if model.dtype == torch.float16:
        model = model.float()
    return model.eval().to(pick_device(options.device))


def _auto_class(out: Path) -> str:
    """The class of transformers that loads a mixture, which may see or hear."""
    config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    return "AutoModelForImageTextToText" if "text_config" in config else "AutoModelForCausalLM"


def config_of(out: Path) -> dict[str, Any]:
    """The config.json of a mixture, or of its language part, with its numbers of experts.

    Raises:
        InputError: the file is missing, or is no mixture's.
    """
    try:
        whole = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
        config = whole.get("text_config", whole)
        numbers = [[config[key] for key in k if key in config] for k in (COUNTS, PER_TOKEN)]
        if all(of and isinstance(of[0], int) and of[0] > 0 for of in numbers):
            return dict(config)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    fix = "name a directory that holds a mixture of experts"
    raise InputError([Problem(str(out), f"has no {CONFIG_FILE} of a mixture", fix)])


def encoder_of(out: Path) -> Encoder:
    """The mixture's tokenizer.

    Raises:
        InputError: the tokenizer is missing or cannot be read.
    """
    try:
        return Encoder(out)
    except ValueError as error:
        raise InputError([Problem(str(out), str(error), "copy the base's tokenizer")]) from error


def _streamed(out: Path, options: RunOptions, reporter: Reporter) -> Any:
    moe = open_moe(str(out.absolute()), options.cache_dir, Findings())
    options = dataclasses.replace(options, lazy=True, load_in_4bit=False)
    model = load(moe, options, reporter, dtype_of(moe)).eval()
    model.config.output_router_logits = False  # a streamed layer cannot record them
    model.config.use_cache, model.config.model_type = True, moe.family
    return model
