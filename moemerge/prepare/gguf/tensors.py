"""The tensors of a GGUF file: body, routers and experts under llama.cpp's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moemerge.architectures import TURNED, GgufHost, dense_shapes
from moemerge.checkpoint import Checkpoint, llama3_factors
from moemerge.families import DOWN, GATE, UP
from moemerge.plan import ROUTERS, Halve, Join, Plan, Recipe, Values, recipe
from moemerge.prepare.gguf.fields import FREQUENCIES
from moemerge.prepare.layout import Layout

_MLP = {GATE: "ffn_gate", UP: "ffn_up", DOWN: "ffn_down"}
Wanted = tuple[str, tuple[int, ...], Recipe, str, int | None]
"""A tensor of the file: name, shape, recipe, what a gate mode makes of it, and whose it is."""


def body_tensors(
    config: dict[str, Any], recipe_of: Callable[[str], Recipe], host: GgufHost
) -> Iterator[Wanted]:
    """The tensors beside the MLPs, from the dense model's."""
    head = config["head_dim"]
    for name, own in dense_shapes(config).items():
        if ".mlp." in name:
            continue
        of = recipe_of(name)
        if name in host.top:
            yield f"{host.top[name]}.weight", own, of, "", None
            continue
        stem, _, leaf = name.rpartition(".")
        _, _, layer, rest = stem.split(".", 3)
        if rest in TURNED and host.turns_neighbours:
            of = Halve(of, head, head, back=True)
        flat = own if len(own) < 3 else (own[0], own[2])
        yield f"blk.{layer}.{host.body[rest]}.{leaf}", flat, of, "", None


def frequencies(base: Checkpoint) -> Iterator[Wanted]:
    """The tensor that a Llama 3's rope scaling becomes."""
    scaling = base.config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        theta, head = base.config["rope_theta"], base.config["head_dim"]
        values = tuple(llama3_factors(scaling, theta, head))
        yield FREQUENCIES, (len(values),), Values(values), "", None


def expert_tensors(
    layer: int, which: str, routed: Sequence[Recipe], one: tuple[int, ...]
) -> Wanted:
    """One matrix of all experts of a layer, end to end."""
    name = f"blk.{layer}.{_MLP[which]}_exps.weight"
    return name, (len(routed), *one), Join(tuple(routed)), "", -1


def shared_tensor(layer: int, which: str, of: Recipe, own: tuple[int, ...]) -> Wanted:
    """One matrix of a layer's always active experts, which are one wide MLP."""
    return f"blk.{layer}.{_MLP[which]}_shexp.weight", own, of, "", None


_MADE = {"router": "ffn_gate_inp.weight", "bias": "exp_probs_b.bias"}


def made_name(layer: int, kind: str) -> str:
    """The name of a layer's router, or of the bias that balances its load."""
    return f"blk.{layer}.{_MADE[kind]}"


def experts(made: Layout, plan: Plan) -> Iterator[Wanted]:
    """The routers and the experts of all layers."""
    parts, mixture, seed = made.parts, made.target.mixture, made.options.seed
    hidden, inner = parts.body.config["hidden_size"], mixture.inner
    routers = [tensor for tensor in plan.shards[0].tensors if tensor.made == "router"]
    biases = [tensor for tensor in plan.shards[0].tensors if tensor.made == "bias"]
    for layer, router in enumerate(routers):
        for tensor in (router, *biases[layer : layer + 1]):
            name = made_name(layer, tensor.made)
            rows = _renamed(tensor.recipe, tensor.name, name)
            yield name, tensor.shape, rows, tensor.made, None
        for which in _MLP:
            dense = f"model.layers.{layer}.mlp.{which}.weight"
            one = (hidden, inner) if which == DOWN else (inner, hidden)
            routed = [
                member.recipe(dense, seed, f"expert {at}") for at, member in enumerate(parts.routed)
            ]
            yield expert_tensors(layer, which, routed, one)
            always = tuple(
                member.recipe(dense, seed, f"shared expert {at}")
                for at, member in enumerate(parts.shared)
            )
            if always:
                axis = 1 if which == DOWN else 0
                wide = list(one)
                wide[axis] *= len(always)
                of = Join(always, axis) if len(always) > 1 else always[0]
                yield shared_tensor(layer, which, of, tuple(wide))


def _renamed(of: Recipe, old: str, new: str) -> Recipe:
    """A router's recipe that reads what the gate mode makes under the file's own name."""
    if isinstance(of, recipe.Read):
        assert of == recipe.Read(ROUTERS, old)
        return recipe.Read(ROUTERS, new)
    if isinstance(of, recipe.Cut):
        return dataclasses.replace(of, of=_renamed(of.of, old, new))
    assert isinstance(of, Join)
    return Join(tuple(_renamed(part, old, new) for part in of.of), of.axis)
