"""A mixture's config.json for every reader, and the numbers of experts that its class can run.

Shapes: E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moemerge.architectures import COUNTS, MLP, SPLIT_FACTOR
from moemerge.checkpoint import FLOATS
from moemerge.errors import Findings
from moemerge.families import PARTIAL
from moemerge.mixture.open import Moe
from moemerge.mixture.parts import Part
from moemerge.plan import Scale
from moemerge.tokenizer import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILE, portable, read_object


def is_wrong(moe: Moe) -> bool:
    """Whether a reader cannot load the mixture, because of tensor names, config or tokenizer."""
    config = moe.config
    scaled = moe.dense["rope_scaling"] is not None
    deaf = "rope_parameters" in config and not (
        "rope_theta" in config and (config.get("rope_scaling") or not scaled)
    )
    made = config_of(moe, moe.experts, moe.per_token)
    differs = config != read_object(moe.checkpoint.directory / "config.json")
    differs |= any(config.get(key) != made.get(key) for key in (*COUNTS, "layer_types"))
    return moe.is_misnamed or deaf or differs or _is_foreign(moe)


def _is_foreign(moe: Moe) -> bool:
    """Whether a tokenizer or generation config has a key that some reader fails on."""
    directory, rows = moe.checkpoint.directory, int(moe.dense["vocab_size"])
    fast = (directory / TOKENIZER_FILE).is_file()
    there = [n for n in (CONFIG_FILE, GENERATION_FILE) if (directory / n).is_file()]
    contents = {name: (directory / name).read_bytes() for name in there}
    return any(portable(name, has, fast, rows)[0] != has for name, has in contents.items())


def config_of(moe: Moe, experts: int, per_token: int) -> dict[str, Any]:
    """The mixture's config.json with these numbers, for transformers 4 and 5."""
    dense, config = moe.dense, moe.config
    rope, part = dense["rope_parameters"], dense[PARTIAL]
    partial = {PARTIAL: part} if part != 1 or moe.reading.turned != 1 else {}
    long = config.get("dtype") or config.get("torch_dtype") or long_name(moe.parts[0].dtype)
    counts = (*moe.reading.counts, *(key for key in COUNTS if key in config))
    types, factor = _layer_kinds(moe), moe.reading.factor
    numbers = {**dict.fromkeys(counts, experts), moe.reading.per_token: per_token}
    if "said" in dense:  # a body of another kind: its keys are the class's own
        return {**config, "dtype": long, "torch_dtype": long, **numbers}
    return {
        **config,
        "head_dim": dense["head_dim"],
        "rope_theta": dense["rope_theta"],
        "rope_scaling": dense["rope_scaling"] and {**dense["rope_scaling"], **partial},
        "rope_parameters": {**rope, **partial},
        **partial,
        "dtype": long,
        "torch_dtype": long,
        **numbers,
        **({"layer_types": types} if types else {}),
        **(
            {"sliding_window": config["sliding_window"] or None}
            if "sliding_window" in config
            else {}
        ),
        **({SPLIT_FACTOR: per_token} if moe.factor else {}),
        **({factor: config[factor] * per_token / moe.factor} if has_factor(moe) else {}),
    }


def _layer_kinds(moe: Moe) -> list[Any]:
    """Each layer's kind by its name in transformers 4, which transformers 5 understands too."""
    types, known = moe.config.get("layer_types"), moe.reading.older_kinds
    return [known.get(str(kind), kind) for kind in types] if isinstance(types, list) else []


def long_name(dtype: str) -> str:
    """A dtype as config.json calls it."""
    return next((long for long, short in FLOATS.items() if short == dtype), "float32")


def check_groups(moe: Moe, count: int, findings: Findings) -> None:
    """Record a number of experts that the class cannot run.

    Experts are in groups of equal size. A sigmoid class scores a group by its best two experts, so
    a group needs two.
    """
    groups = moe.config.get("n_group") or 1
    best = 2 if "n_group" in moe.config and any(part.made == "bias" for part in moe.parts) else 1
    if type(groups) is not int or groups < 1 or count % groups:
        what = f"its experts are in {groups!r} groups, which {count} cannot be"
        findings.problem(moe.text, what, "there is no way but to merge anew")
    elif count // groups < best:
        what = (
            f"a {moe.family} takes the best two experts of each of {groups} groups, not of {count}"
        )
        fix = "use extract: one expert is a dense model" if groups == 1 else "merge anew"
        findings.problem(moe.text, what, fix)


def most_per_token(moe: Moe) -> int:
    """The most experts that a token can choose: the experts of the groups that it may use."""
    groups, chosen = (moe.config.get(key) or 1 for key in ("n_group", "topk_group"))
    whole = type(groups) is type(chosen) is int and 1 <= chosen <= groups
    return moe.experts // groups * chosen if whole else moe.experts


def check_whole(moe: Moe, findings: Findings) -> None:
    """Record a problem if the experts are parts of MLPs."""
    if moe.factor or moe.segments > 1:
        kind = (
            "slices of the model that was split" if moe.factor else f"{moe.segments} segments each"
        )
        what = f"its experts are parts of MLPs ({kind})"
        findings.problem(moe.text, what, "use the models that it was made of")


def has_factor(moe: Moe) -> bool:
    """Whether the mixture is a split whose config.json has a factor for the chosen slices."""
    factor = moe.reading.factor
    return bool(moe.factor and factor and isinstance(moe.config.get(factor), int | float))


def weighed(part: Part, per_token: int, moe: Moe) -> Part:
    """The part scaled for `per_token` chosen slices, if it is the down projection of a split."""
    if part.expert is None or MLP[part.which] != "down_proj" or moe.factor in (0, per_token):
        return part
    return replace(part, recipe=Scale(part.recipe, per_token / moe.factor))
