"""The fields of a GGUF file: those of the base's file, or those that its config.json gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moemerge.architectures.gguf_hosts import GgufHost
from moemerge.checkpoint import Checkpoint
from moemerge.errors import Findings
from moemerge.plan import encoded
from moemerge.prepare.layout import Layout

FREQUENCIES = "rope_freqs.weight"
_LEFT_OUT = ("quantize.", "split.", "general.source.", "general.base_model.")
"""Fields of a file that are not true of a mixture."""


def fields_of(
    base: Checkpoint,
    made: Layout,
    host: GgufHost,
    counted: Mapping[str, int],
    number: int | None,
    findings: Findings,
) -> dict[str, bytes]:
    """The fields, each with its type and value; `number` is the kind of file, if it changes."""
    config = made.parts.body.config
    own = {
        "general.architecture": host.name,
        "general.name": " + ".join(donor.name for donor in made.donors),
        **{f"{host.name}.{key}": value for key, value in counted.items()},
        **{f"{host.name}.{key}": float(value) for key, value in host.more(config).items()},
    }
    if made.parts.shared:
        width = made.target.mixture.inner * len(made.parts.shared)
        own[f"{host.name}.expert_shared_feed_forward_length"] = width
    if number is not None:
        own |= {"general.file_type": number, "general.quantization_version": 2}
    fields: dict[str, bytes] = {}
    if base.gguf:
        old = f"{base.gguf.kind.name}."
        for name, field in base.gguf.fields.items():
            if name.startswith(_LEFT_OUT):
                continue
            name = f"{host.name}.{name.removeprefix(old)}" if name.startswith(old) else name
            fields[name] = field.raw
    else:
        for name, value in _of_config(base, config, host, findings).items():
            fields[name] = encoded(value)
    return fields | {name: encoded(value) for name, value in own.items()}


def _of_config(
    base: Checkpoint, config: Mapping[str, Any], host: GgufHost, findings: Findings
) -> dict[str, Any]:
    raise NotImplementedError
