"""A PEFT LoRA adapter as changes of tensors: low-rank deltas and replacements.

The arithmetic is PEFT's (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W + scale * B @ A, with
scale = alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moemerge.architectures import LAYER, count_of, reading_of
from moemerge.checkpoint import lora_config
from moemerge.checkpoint.fused import row_name, rows_of
from moemerge.checkpoint.lora_config import MERGE_FIRST
from moemerge.checkpoint.not_a_model import SourceProblem
from moemerge.checkpoint.open import Checkpoint, with_rows
from moemerge.families import EMBEDDING, HEAD

_PREFIX = "base_model.model."
_CHANGES = "changes {!r}, which the model does not have"
_TRAINED_ON = "name the model that the adapter was trained on"
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.([^.]+))?(?(2)|\.weight)")
_PART = re.compile(r"(.+)\.(lora_B(?:\.[^.]+)?\.bias|token_adapter\..+)")
_STRANGE = re.compile(r"\.lora_(?!velora_)|\.ranknum|token_adapter|magnitude")


@dataclass(frozen=True)
class Delta:
    """scale * up @ down, with `down` (r, in) and `up` (out, r) named in the adapter.

    If experts share an `up` (out, r * every), only its columns `first`, `first + every` and so on
    count. If `transposed`, as for an embedding, the shapes are (in, r) and (r, out).
    """

    down: str
    up: str
    scale: float
    every: int = 1
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Adapter:
    """The changes that an adapter makes, by the names of its model's tensors.

    A tensor with both a replacement and a delta is the replacement plus the delta. If the adapter
    was trained on fused tensors, each part has a delta: all of `down`, and its own rows of `up`. If
    it was trained on stacked experts (PEFT's `target_parameters`), each part has its own rows of
    `down` too. `obstacles` are tensors that it changes in a way that cannot be reproduced: what it
    does, and the fix; a user of such a tensor must refuse it. With `untied`, the head becomes a
    matrix of its own, which starts as a copy of the embeddings.
    """

    checkpoint: Checkpoint
    deltas: dict[str, Delta]
    replacements: dict[str, str]
    obstacles: dict[str, tuple[str, str]] = field(default_factory=dict)
    untied: bool = False
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> set[str]:
        """The tensors that it changes, obstacles among them."""
        return {*self.deltas, *self.replacements, *self.obstacles}

    def model(self, model: Checkpoint) -> Checkpoint:
        """Its model, with a separate head if `untied`."""
        if not self.untied:
            return model
        config = {**model.config, "tie_word_embeddings": False}
        tensors = {**model.tensors, HEAD: model.tensors[EMBEDDING]}
        return dataclasses.replace(model, config=config, tensors=tensors)

    def name_in_model(self, tensor: str) -> str:
        """The name of a tensor in the model's files."""
        return EMBEDDING if self.untied and tensor == HEAD else tensor


def open_adapter(checkpoint: Checkpoint, model: Checkpoint) -> Adapter:
    """Read an opened adapter for the model that it was trained on.

    Raises:
        SourceProblem: it is not a plain LoRA adapter, or it does not fit the model.
    """
    lora_config.check(checkpoint.config)
    found = _Reader(checkpoint, model)
    names = [name for name in checkpoint.tensors if name not in checkpoint.views]
    for name in sorted(names, key=lambda name: ".lora_" not in name):
        found.take(name)
    untied = found.tie()
    if not found.deltas and not found.replacements and not found.obstacles:
        raise SourceProblem("holds no LoRA weights that it targets", "name another adapter")
    rows = [one for delta in found.deltas.values() for one in (delta.down, delta.up)]
    rows += found.replacements.values()
    return Adapter(
        with_rows(checkpoint, rows),
        found.deltas,
        found.replacements,
        found.obstacles,
        untied,
        tuple(found.notes()),
    )


class _Reader:
    """Reads an adapter's tensors, one by one, as changes of its model's tensors."""

    def __init__(self, checkpoint: Checkpoint, model: Checkpoint):
        self.checkpoint, self.model, self.config = checkpoint, model, checkpoint.config
        self.deltas: dict[str, Delta] = {}
        self.replacements: dict[str, str] = {}
        self.obstacles: dict[str, tuple[str, str]] = {}
        self.own: set[str] = set()  # replaced as modules_to_save, apart from what they are tied to
        self.adapters: set[str] = set()
        self.left_out: list[str] = []
        reading = reading_of(model.config.get("model_type"), model.tensors)
        self.names = reading.names if reading else None
        self.tied = bool(model.config.get("tie_word_embeddings"))

    def take(self, name: str) -> None:
        """Read what tensor `name` changes; LoRA tensors come first.

        Raises:
            SourceProblem: it is more than plain LoRA, or does not fit.
        """
        module = name.removeprefix(_PREFIX)
        if found := _LORA.fullmatch(module):
            self._lora(name, found[1], embedding=bool(found[2]), half=found[3], adapter=found[4])
        elif found := _PART.fullmatch(module):
            what = "single rows (trainable_token_indices)"
            if found[2].startswith("lora_B"):
                what = "a bias of its own (lora_bias)"
            self.obstacles[f"{found[1]}.weight"] = f"the adapter trained {what} there", MERGE_FIRST
        elif _STRANGE.search(module):
            raise SourceProblem(f"holds {name!r}, which is more than plain LoRA", MERGE_FIRST)
        elif "lora_velora_" not in module:
            self._replace(name, module)

    def tie(self) -> bool:
        """Apply changes of tied embeddings to the head too; returns whether the model is no longer
        tied.

        PEFT changes each of the two alone, except with `ensure_weight_tying`, or if the model's own
        matrix was saved too.
        """
        if not self.tied:
            return False
        for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
            if name in self.obstacles and other not in self.obstacles:
                what, fix = self.obstacles[name]
                self.obstacles[other] = f"tied to {name}: {what}", fix
            if name in self.replacements and name not in self.own and other not in self.own:
                self._copy(name, other, self.replacements)
        if self.config.get("ensure_weight_tying"):
            scales = {self.deltas[n].scale for n in (EMBEDDING, HEAD) if n in self.deltas}
            if len(scales) > 1:
                what = "scales tied embeddings and head apart (rank_pattern, alpha_pattern)"
                raise SourceProblem(what, MERGE_FIRST)
            self._copy(EMBEDDING, HEAD, self.deltas)
            self._copy(EMBEDDING, HEAD, self.replacements)
        kinds: tuple[Mapping[str, object], ...] = (self.deltas, self.replacements)
        untied = any(kind.get(EMBEDDING) != kind.get(HEAD) for kind in kinds)
        if not untied and HEAD not in self.model.tensors:
            for kind in (self.deltas, self.replacements, self.obstacles):
                kind.pop(HEAD, None)
        return untied

    def notes(self) -> list[str]:
        """Notes for a person."""
        notes = [
            f"{key} in adapter_config.json is not known here: it is passed over"
            for key in lora_config.unknown(self.config)
        ]
        if self.left_out:
            more = f" and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
            notes.append(
                f"{self.left_out[0]}{more}: left out, as PEFT does: target_modules and its "
                "neighbours in adapter_config.json do not choose that module"
            )
        return notes

    @staticmethod
    def _copy(name: str, other: str, kind: dict[str, Any]) -> None:
        if name in kind:
            kind[other] = kind[name]

    def _lora(
        self, name: str, module: str, embedding: bool, half: str, adapter: str | None
    ) -> None:
        """Add the delta of a matrix A; its B is found by name."""
        partner = _partner(name)
        if partner not in self.checkpoint.tensors:
            raise SourceProblem(f"holds {name!r} but not {partner!r}", "save the adapter again")
        self.adapters.add(adapter or "")
        if len(self.adapters) > 1:
            what = f"holds several adapters ({', '.join(sorted(self.adapters))})"
            raise SourceProblem(what, "save one alone")
        if half == "B":
            return
        parameter = _wrapped(self.config, module)
        if parameter and not parameter.endswith(".weight"):
            self._stacked(parameter, name, partner)
            return
        target = parameter or f"{module}.weight"
        if (whole := self._shape(target)) is None:
            raise SourceProblem(_CHANGES.format(target), _TRAINED_ON)
        if not parameter and not self._targets(module):
            self.left_out.append(name)
            return
        a, b = (self.checkpoint.tensors[one].shape for one in (name, partner))
        high, wide = (whole[1:], whole[0]) if embedding else (whole[:1], whole[-1])
        rank = (*a, 0)[0]
        if (a, b) != ((rank, wide), (*high, rank)) or len(whole) != 2:
            self._misfit(target, f"its matrices are {list(a)} and {list(b)}", whole)
            return
        scale = lora_config.scale(self.config, target, parameter or module, rank)
        down, up = (partner, name) if embedding else (name, partner)
        for part, rows in self._parts(target, up).items():
            self.deltas[part] = Delta(down, rows, scale, transposed=embedding)

    def _targets(self, module: str) -> bool:
        """Whether PEFT puts a LoRA on this module; it has its own rules for mixtures."""
        if module == "lm_head" and self.tied and self.config.get("ensure_weight_tying"):
            module = "model.embed_tokens"
        return self.names is not None or lora_config.targets(self.config, module)

    def _stacked(self, parameter: str, down: str, up: str) -> None:
        """Add the deltas of an adapter of stacked experts, one for each expert.

        PEFT reshapes A (E * r, in) to (E, r, in), but B (out, r * E) to (out, r, E).
        """
        found, names = LAYER.fullmatch(parameter), self.names
        own: dict[tuple[int, int], str] = {}
        if found and names and found[3] in (*names.uppers, *names.lowers):
            count = count_of(self.model.config)
            each = (0, 1) if found[3] in names.uppers else (2,)
            for expert in range(count if isinstance(count, int) else 0):
                own |= {(expert, n): found[1] + names.matrix(expert, w) for n, w in enumerate(each)}
        if not own or not {*own.values()} <= self.model.tensors.keys():
            raise SourceProblem(_CHANGES.format(parameter), _TRAINED_ON)
        experts, parts = len({expert for expert, _ in own}), len({part for _, part in own})
        high, wide = self.model.tensors[own[0, 0]].shape
        a, b = (self.checkpoint.tensors[one].shape for one in (down, up))
        rank = (*a, 0)[0] // experts
        if (a, b) != ((experts * rank, wide), (high * parts, experts * rank)):
            what = f"its matrices are {list(a)} and {list(b)}"
            self._misfit(parameter, what, (experts, high * parts, wide))
        scale = lora_config.scale(self.config, parameter, parameter, rank)
        for (expert, part), name in own.items():
            self.deltas[name] = Delta(
                row_name(down, range(expert * rank, (expert + 1) * rank)),
                row_name(up, range(part * high, (part + 1) * high)),
                scale,
                experts,
                expert,
            )

    def _replace(self, name: str, module: str) -> None:
        """Add a tensor that replaces one of the model's."""
        target = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", module)
        own = target != module or lora_config.is_saved_whole(self.config, target.rpartition(".")[0])
        target = target.replace(".base_layer.", ".")
        if target in self.deltas and ".base_layer." not in module:
            self.left_out.append(name)
            return
        have, found = self._shape(target), self.checkpoint.tensors[name].shape
        if have is None:
            what = f"replaces {target!r} by {list(found)}, the model has no such tensor"
            raise SourceProblem(what, _TRAINED_ON)
        if have != found:
            self._misfit(target, f"the adapter's is {list(found)}", have)
            return
        self.own |= {target} if own else set()
        self.replacements |= self._parts(target, name)

    def _misfit(self, target: str, what: str, have: tuple[int, ...]) -> None:
        """Refuse a shape; for embeddings or head, only if a merge needs them."""
        what += f", the model's {list(have)}"
        if target not in (EMBEDDING, HEAD):
            raise SourceProblem(f"{target}: {what}", _TRAINED_ON)
        fix = f"{_TRAINED_ON}; where tokens were added, {MERGE_FIRST}"
        self.obstacles[target] = what, fix

    def _shape(self, target: str) -> tuple[int, ...] | None:
        """The shape of the model's tensor on which the adapter was trained, fused or not."""
        if self.tied and target == HEAD:
            target = EMBEDDING
        if target in self.model.tensors:
            return self.model.tensors[target].shape
        parts = rows_of(self.model.views, target)
        if not parts:
            return None
        first = self.model.tensors[next(iter(parts))]
        return (sum(map(len, parts.values())), *first.shape[1:])

    def _parts(self, target: str, tensor: str) -> dict[str, str]:
        """The model's tensors that the adapter's `tensor` is for, and the rows that each of them
        has."""
        parts = rows_of(self.model.views, target)
        if target in self.model.tensors or not parts:
            return {target: tensor}
        return {name: row_name(tensor, rows) for name, rows in parts.items()}


def _partner(name: str) -> str:
    """The name of the other matrix: B for A, and A for B."""
    found = re.fullmatch(r"(.+\.lora_(?:embedding_)?)([AB])(.*)", name)
    assert found
    return f"{found[1]}{'BA'['AB'.index(found[2])]}{found[3]}"


def _wrapped(config: dict[str, Any], module: str) -> str | None:
    """The parameter for which PEFT's wrapper at `module` is; of several, the innermost is the
    first."""
    path = module
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    depth = (len(module) - len(path)) // len(".base_layer")
    targets = [one for one in config.get("target_parameters") or () if isinstance(one, str)]
    names = [f"{path}.{leaf}" for leaf in ("gate_up_proj", "down_proj", "weight")]
    own = [name for name in names if any(f".{name}".endswith(f".{one}") for one in targets)]
    return own[-1 - depth] if depth < len(own) else None
