"""gemma4: Gemma 4's own mixture block, with experts beside an MLP.

The class adds the output of its dense MLP, here a narrow one of zeros, to that of the experts,
each through a norm of its own: the MLP's is 0, the experts' is 1. The dense model's norm follows.
Two norms in a row are one, up to their epsilon: with m the mean square of the MLP's output and e
the epsilon, the result differs by about e (1 - m) / 2m of itself.

The router reads the input of the norm before the MLP, divided by its root mean square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import NARROW, router, stacked
from moemerge.architectures.limits import Holds, as_said
from moemerge.architectures.reading import Names, Reading, RouterInput, dense_of
from moemerge.architectures.slots import Constant, FromBody, Mixture, Slot, whole
from moemerge.families import DOWN, GATE, LAYER, UP

_OWN = ("moe_intermediate_size", "num_experts", "top_k_experts", "enable_moe_block")

HOLDS = Holds(layers=("gemma 4",))
READING = Reading(
    Names(
        expert="experts.",
        router="router.proj.weight",
        uppers=("experts.gate_up_proj",),
        lowers=("experts.down_proj",),
        stacked=True,
        bias="per_expert_scale",
        shared=("mlp.",),
        shared_gate="",
    ),
    counts=("num_experts",),
    per_token="top_k_experts",
    model_types=("gemma4_text",),
    dense=dense_of("gemma4_text", _OWN),
    sees=RouterInput("pre_feedforward_layernorm", unit=True),
)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 5", "mlx-lm", "vLLM")
ALIASES = ()
TRAINING: dict[str, Any] = {}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Parts of MLPs, if some layers' MLPs are wider than others'."""
    if mixture.told and config["use_double_wide_mlp"] and config["num_kv_shared_layers"]:
        what = "has MLPs of two widths (use_double_wide_mlp), which cannot be cut into parts"
        yield what, "leave out split and segments"


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """The bound of the class itself."""
    eps = config["rms_norm_eps"]
    line = (
        f"a gemma4 norms the experts' output twice: exact up to about {eps:g} (1 - m) / 2m, "
        "where m is the mean square of an MLP's output"
    )
    yield "", line
    if "wrapper" in config:
        yield "vLLM", "vLLM cannot load it without torchvision, and was not tried with that"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names; routers; all experts in two tensors a layer."""
    hidden, narrow = config["hidden_size"], min(mixture.inner, NARROW)

    def mlp(at: int) -> Iterator[Slot]:
        layer = LAYER.format(layer=at)
        yield router(f"{layer}router.proj.weight", config, mixture)
        yield Slot(f"{layer}router.scale", (hidden,), Constant(hidden**0.5))
        yield Slot(f"{layer}router.per_expert_scale", (mixture.experts,), Constant(1.0))
        before = FromBody(f"{layer}pre_feedforward_layernorm.weight")
        yield Slot(f"{layer}pre_feedforward_layernorm_2.weight", (hidden,), before)
        for number, value in ((1, 0.0), (2, 1.0)):
            name = f"{layer}post_feedforward_layernorm_{number}.weight"
            yield Slot(name, (hidden,), Constant(value))
        for which in (GATE, UP, DOWN):
            shape = (hidden, narrow) if which == DOWN else (narrow, hidden)
            yield Slot(f"{layer}mlp.{which}.weight", shape, Constant(0.0))
        upper, lower = f"{layer}experts.gate_up_proj", f"{layer}experts.down_proj"
        yield from stacked(config, mixture, at, upper, lower)

    return whole(config, mlp, copies_head=False)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; the dense MLP is narrow, and as wide in all layers."""
    own = {
        "enable_moe_block": True,
        "intermediate_size": min(mixture.inner, NARROW),
        "moe_intermediate_size": mixture.inner,
        "num_experts": mixture.experts,
        "top_k_experts": mixture.per_token,
        "use_double_wide_mlp": False,
    }
    names = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")
    made = as_said(config, mixture, dtype, TRAINING, own, "gemma4_text", names)
    beside = {"vocab_size": config["vocab_size"]}  # where mlx-lm looks for it
    return {**made, **(beside if "wrapper" in config else {})}
