"""The fields of a GGUF file: those of the base's file, or those that its config.json gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moemerge.architectures import GgufHost, Mixture, counts, key_heads, rope_of
from moemerge.checkpoint import SUMS, Checkpoint, tokenizer_fields
from moemerge.plan import encoded

FREQUENCIES = "rope_freqs.weight"
_LEFT_OUT = ("quantize.", "split.", "general.source.", "general.base_model.")
"""Fields of a file that are not true of a mixture."""

_NORMS = "attention.layer_norm"
"""How fields of the norms' epsilon begin; one of another kind would change the norms."""


def fields_of(
    base: Checkpoint,
    config: Mapping[str, Any],
    host: GgufHost,
    mixture: Mixture,
    names: tuple[str, ...],
    shared: int,
    number: int | None,
    imatrix: Checkpoint | None = None,
) -> dict[str, bytes]:
    """The fields, each with its type and value; `number` is the kind of file, if it changes.

    Raises:
        ValueError: llama.cpp has no name for the base's tokenizer or rope scaling.
    """
    own: dict[str, Any] = {
        "general.architecture": host.name,
        "general.name": " + ".join(names),
        **{f"{host.name}.{key}": value for key, value in counts(mixture).items()},
        **{f"{host.name}.{key}": value for key, value in host.more(config).items()},
    }
    if shared:
        own[f"{host.name}.expert_shared_feed_forward_length"] = shared
    if number is not None:
        own |= {"general.file_type": number, "general.quantization_version": 2}
    if imatrix:
        count = sum(name.endswith(SUMS) for name in imatrix.tensors)
        told = {"file": imatrix.place.name, "entries_count": count}
        own |= {f"quantize.imatrix.{key}": value for key, value in told.items()}
    fields: dict[str, bytes] = {}
    if base.gguf:
        old = f"{base.gguf.kind.name}."
        for name, field in base.gguf.fields.items():
            if name.startswith(_LEFT_OUT):
                continue
            name = f"{host.name}.{name.removeprefix(old)}" if name.startswith(old) else name
            if not name.startswith(f"{host.name}.{_NORMS}") or name.endswith(f".{host.epsilon}"):
                fields[name] = field.raw
    else:
        made = {f"{host.name}.{key}": value for key, value in _of_config(config, host)}
        made |= {f"{host.name}.rope.scaling.{key}": value for key, value in _scaling(config)}
        rows = int(config["vocab_size"])
        made |= {"general.type": "model", **tokenizer_fields(base.directory, rows, config)}
        fields = {name: encoded(value) for name, value in made.items()}
    return {**fields, **{name: encoded(value) for name, value in own.items()}}


def _of_config(config: Mapping[str, Any], host: GgufHost) -> Iterator[tuple[str, Any]]:
    head, keys = config["head_dim"], key_heads(config)
    yield "vocab_size", config["vocab_size"]
    yield "context_length", config["max_position_embeddings"]
    yield "embedding_length", config["hidden_size"]
    yield "block_count", config["num_hidden_layers"]
    yield "feed_forward_length", config["intermediate_size"]
    yield "attention.head_count", config["num_attention_heads"]
    yield "attention.head_count_kv", keys if 0 in keys else config["num_key_value_heads"]
    yield "attention.key_length", head
    yield "attention.value_length", head
    yield f"attention.{host.epsilon}", float(config["rms_norm_eps"])
    yield "rope.dimension_count", head
    yield "rope.freq_base", float(config["rope_theta"])


def _scaling(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rope scaling; a Llama 3's is a tensor."""
    scaling = rope_of(config)
    kind = scaling.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope scaling {kind!r} is not written as GGUF")
    yield "type", kind
    yield "factor", float(scaling["factor"])
    if kind == "yarn":
        length = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
        yield "original_context_length", length
