"""The architectures of GGUF files that moemerge reads: their fields and tensors in transformers'
terms. A new one is a record in `KINDS`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moemerge.checkpoint.gguf.header import Header
from moemerge.families import EMBEDDING, HEAD, NORM, RECORDS

TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": NORM, "output.weight": HEAD}
FREQUENCIES = "rope_freqs.weight"
"""A tensor that llama.cpp's converter makes of a Llama 3's rope scaling."""

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+(?:\.\w+)?)\.(weight|bias)")
_LEAVES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TURNED = ("attn_q", "attn_k")
_LFM2 = {
    **_LEAVES, "attn_norm": "operator_norm", "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm", "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
}  # fmt: skip

_PHI3 = {**_LEAVES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}


def _nothing(header: Header, prefix: str) -> dict[str, Any]:
    return {}


def _granite(header: Header, prefix: str) -> dict[str, Any]:
    keys = {
        "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    }  # fmt: skip
    found = {ours: header.value(f"{prefix}.{key}", float) for ours, key in keys.items()}
    return {key: short(value) for key, value in found.items() if value is not None}


def _lfm2(header: Header, prefix: str) -> dict[str, Any]:
    """A layer without key heads is a convolution."""
    layers = header.value(f"{prefix}.block_count", int)
    said = header.value(f"{prefix}.attention.head_count_kv", (int, list))
    heads = said if isinstance(said, list) else [said] * min(layers, len(header.tensors))
    if len(heads) != layers:
        what = f"its {prefix}.attention.head_count_kv has {len(heads)} numbers"
        raise ValueError(f"{what} for {layers} layers")
    return {
        "layer_types": ["full_attention" if number else "conv" for number in heads],
        "conv_L_cache": header.value(f"{prefix}.shortconv.l_cache", int),
        "block_auto_adjust_ff_dim": False,
    }


def _phi3(header: Header, prefix: str) -> dict[str, Any]:
    """A window of 0 is none."""
    found = {
        "sliding_window": header.value(f"{prefix}.attention.sliding_window", int, 0) or None,
        "original_max_position_embeddings": header.value(
            f"{prefix}.rope.scaling.original_context_length", int
        ),
    }
    return {key: value for key, value in found.items() if value is not None}


def _cohere2(header: Header, prefix: str) -> dict[str, Any]:
    """One layer of every few attends to everything."""
    scale = header.value(f"{prefix}.logit_scale", float)
    if scale is None or not math.isfinite(scale):
        raise ValueError(f"its {prefix}.logit_scale is {scale}")
    every = header.value(f"{prefix}.attention.sliding_window_pattern", int, 4)
    return {
        "logit_scale": short(scale),
        "sliding_window": header.value(f"{prefix}.attention.sliding_window", int),
        "sliding_window_pattern": every,
    }


@dataclass(frozen=True)
class Kind:
    """One architecture. `turns_neighbours`: the converter put the rows of q and k in the order in
    which rope turns neighbours. `more` gives further keys of config.json. `deep` are matrices that
    transformers has with a length of 1 in the middle. `mixed`: some layers have no key heads.
    `epsilon` is the field of the norms' epsilon."""

    name: str
    family: str
    turns_neighbours: bool = False
    more: Callable[[Header, str], dict[str, Any]] = _nothing
    leaves: Mapping[str, str] = field(default_factory=lambda: _LEAVES)
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    deep: tuple[str, ...] = ()
    mixed: bool = False
    epsilon: str = "layer_norm_rms_epsilon"

    def ours(self, name: str) -> str | None:
        """Transformers' name of a tensor of the file; None if it is not known."""
        if name in self.top:
            return self.top[name]
        if (found := _BLOCK.fullmatch(name)) and found[2] in self.leaves:
            return f"model.layers.{int(found[1])}.{self.leaves[found[2]]}.{found[3]}"
        return None

    def is_turned(self, name: str) -> bool:
        """Whether the rows of a tensor of the file are in another order than transformers'."""
        found = _BLOCK.fullmatch(name)
        return self.turns_neighbours and found is not None and found[2] in _TURNED

    def shape(self, name: str, own: tuple[int, ...]) -> tuple[int, ...]:
        """Transformers' shape of a tensor of the file with that shape."""
        found = _BLOCK.fullmatch(name)
        deep = found is not None and found[2] in self.deep and len(own) == 2
        return (own[0], 1, own[1]) if deep else own


KINDS = {
    one.name: one
    for one in (
        Kind("llama", "llama", turns_neighbours=True),
        Kind("qwen2", "qwen2"),
        Kind("qwen3", "qwen3"),
        Kind("granite", "granite", turns_neighbours=True, more=_granite),
        Kind(
            "lfm2",
            "lfm2",
            more=_lfm2,
            leaves=_LFM2,
            deep=("shortconv.conv",),
            mixed=True,
            top={
                "token_embd.weight": EMBEDDING,
                "output.weight": HEAD,
                "token_embd_norm.weight": "model.embedding_norm.weight",
            },
        ),
        Kind("phi3", "phi3", more=_phi3, leaves=_PHI3),
        Kind("cohere2", "cohere2", more=_cohere2, epsilon="layer_norm_epsilon"),
    )
}


def short(value: float) -> float:
    """A float32 as it was written in a config.json."""
    return float(f"{value:.7g}")


def kind_of(header: Header) -> Kind:
    """The file's architecture.

    Raises:
        ValueError: it names none, or one that is not read.
    """
    name = header.value("general.architecture", str)
    if not name:
        raise ValueError("it has no general.architecture")
    if name not in KINDS:
        raise ValueError(f"it is a {name}; of GGUF files, moemerge reads {', '.join(KINDS)}")
    if header.value(f"{name}.expert_count", int, 0):
        raise ValueError("it is a mixture of experts itself")
    return KINDS[name]


def config_of(header: Header, kind: Kind) -> dict[str, Any]:
    """The file's fields as a config.json.

    Raises:
        ValueError: a field is missing, of another type, or of a kind that is not read.
    """
    prefix = kind.name

    def number(key: str, default: int | None = None) -> int:
        found = header.value(f"{prefix}.{key}", (int, list), default)
        if isinstance(found, list):  # one for each layer
            if kind.mixed and key == "attention.head_count_kv":
                found = [one for one in found if one]
            if len(set(found)) != 1 or not isinstance(found[0], int):
                raise ValueError(f"its {prefix}.{key} differs between layers, which is not read")
            found = found[0]
        if not isinstance(found, int) or not 0 < found < 1 << 31:
            raise ValueError(f"its {prefix}.{key} is {found}")
        return found

    def real(key: str, default: float) -> float:
        found = header.value(f"{prefix}.{key}", (float, int), default)
        if not math.isfinite(found) or found <= 0:
            raise ValueError(f"its {prefix}.{key} is {found}")
        return short(found)

    hidden, heads = number("embedding_length"), number("attention.head_count")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError("it has no token_embd.weight")
    head = number("attention.key_length", number("rope.dimension_count", hidden // heads))
    if number("attention.value_length", head) != head:
        raise ValueError("its keys and values have heads of different widths, which is not read")
    if number("rope.dimension_count", head) != head:
        raise ValueError("rope turns only a part of its heads, which is not read")
    tied = "output.weight" not in header.tensors
    epsilon = RECORDS[kind.family].usual.get("rms_norm_eps", "rms_norm_eps")
    bias = "blk.0.attn_q.bias" in header.tensors
    return {
        "model_type": kind.family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        epsilon: real(f"attention.{kind.epsilon}", 1e-6),
        "rope_theta": real("rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        **({"attention_bias": bias} if kind.family in ("llama", "qwen3", "granite") else {}),
        **dict(_tokens(header)),
        **kind.more(header, prefix),
    }


def _tokens(header: Header) -> Iterator[tuple[str, int]]:
    for ours, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = header.value(f"tokenizer.ggml.{key}_token_id", int)
        if number is not None:
            yield f"{ours}_token_id", number


def scaling_of(header: Header, kind: Kind, frequencies: list[float] | None) -> dict[str, Any]:
    """The rope scaling of a file as a part of config.json; empty if it has none.

    `frequencies` are the values of `FREQUENCIES`, from which a Llama 3's settings are found.

    Raises:
        ValueError: it is of a kind that is not read.
    """
    prefix = f"{kind.name}.rope.scaling"
    name = header.value(f"{prefix}.type", str, "none")
    if frequencies is not None:
        return _llama3(header, kind, frequencies)
    if name == "none":
        return {}
    factor = header.value(f"{prefix}.factor", (float, int))
    if name not in ("linear", "yarn") or not factor or not math.isfinite(factor) or factor < 1:
        raise ValueError(f"its rope scaling is {name!r} by {factor}, which is not read")
    made: dict[str, Any] = {"rope_type": name, "factor": short(factor)}
    if name == "yarn":
        original = header.value(f"{prefix}.original_context_length", int)
        if not original:
            raise ValueError(f"it has no {prefix}.original_context_length")
        made["original_max_position_embeddings"] = original
    return {"rope_scaling": made}


def _llama3(header: Header, kind: Kind, frequencies: list[float]) -> dict[str, Any]:
    """The settings of a Llama 3.1 or 3.2, if they give these frequencies."""
    factor = max(frequencies, default=0.0)
    made = {
        "rope_type": "llama3", "factor": short(factor), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    theta = header.value(f"{kind.name}.rope.freq_base", (float, int), 10000.0)
    wanted = list(llama3_factors(made, float(theta), 2 * len(frequencies)))
    if factor < 1 or any(abs(a - b) > 1e-3 * b for a, b in zip(frequencies, wanted, strict=True)):
        raise ValueError(f"its {FREQUENCIES} are not those of a Llama 3, which is not read")
    return {"rope_scaling": made}


def llama3_factors(scaling: Mapping[str, Any], theta: float, head: int) -> Iterator[float]:
    """What llama.cpp divides the frequency of each pair of a head by (its converter's formula)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for pair in range(0, head, 2):
        length = 2 * math.pi * theta ** (pair / head)
        if length < original / high:
            yield 1.0
        elif length > original / low:
            yield factor
        else:
            smooth = (original / length - low) / (high - low)
            yield 1 / ((1 - smooth) / factor + smooth)
