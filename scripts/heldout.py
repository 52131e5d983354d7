"""Held-out text, read by dense models and by mixtures of them: loss, and which expert comes first.

Imported by `bench_routing.py`. Everything is float32, in transformers; OMP_NUM_THREADS says on how
many cores, by default on all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

SEPARATOR = "<|endoftext|>"  # stood before every document in SmolLM2's pre-training
PASSAGES_AT_ONCE = 8
ROUTER = re.compile(r"layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight")

Batch = tuple[torch.Tensor, torch.Tensor]
State = dict[str, torch.Tensor]
Texts = dict[str, list[Batch]]  # by kind of text
Losses = dict[str, float]  # nats a token, by kind of text
Chosen = dict[str, list[float]]  # how often each expert comes first, over layers, by kind of text

logging.set_verbosity_error()
logging.disable_progress_bar()


def load_texts(files: dict[str, Path], tokenizer_dir: Path, most: int | None = None) -> Texts:
    """The passages of each kind's file, or `most` of them, as batches, a separator before each."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    start = [tokenizer.get_vocab().get(SEPARATOR, tokenizer.bos_token_id)]
    texts = {}
    for kind, file in files.items():
        lines = file.read_text(encoding="utf-8").splitlines()
        lines = lines[:: max(1, len(lines) // most)][:most] if most else lines
        passages = [json.loads(line)["text"] for line in lines]
        rows = [start + tokenizer(text, add_special_tokens=False).input_ids for text in passages]
        texts[kind] = list(_batches(sorted(rows, key=len)))
    return texts


def _batches(rows: list[list[int]]) -> Iterator[Batch]:
    """Token ids (B, T), and which of those from 1 on are a passage's (B, T - 1).

    Padding stands on the right, where no token of a causal model sees it, and is not counted.
    """
    for at in range(0, len(rows), PASSAGES_AT_ONCE):
        chosen = [torch.tensor(row) for row in rows[at : at + PASSAGES_AT_ONCE]]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        lengths = torch.tensor([len(row) for row in chosen])
        yield ids, torch.arange(1, ids.shape[1]) < lengths[:, None]


@torch.inference_mode()
def read(model: Any, texts: Texts, experts: int = 0) -> tuple[Losses, Chosen]:
    """Each kind's loss and, of a mixture of `experts`, how often each comes first."""
    losses, chosen = {}, {}
    routed = {"output_router_logits": True} if experts else {}
    for kind, batches in texts.items():
        total, count, firsts = 0.0, 0, torch.zeros(experts)
        for ids, counted in batches:
            seen = model.model(ids, use_cache=False, **routed)
            logits = model.lm_head(seen.last_hidden_state[:, :-1][counted])  # (N, V)
            right = ids[:, 1:][counted]
            total += float(torch.nn.functional.cross_entropy(logits, right, reduction="sum"))
            count += len(right)
            for layer in seen.router_logits if experts else ():
                first = layer.view(*ids.shape, experts).argmax(-1)[:, 1:][counted]  # (N)
                firsts += torch.bincount(first, minlength=experts)
        losses[kind] = total / count
        if experts:
            chosen[kind] = (firsts / firsts.sum()).tolist()
    return losses, chosen


def read_dense(dense: Path, experts: list[str], texts: Texts) -> Iterator[tuple[str, str, Losses]]:
    """What a mixture is measured against: name, body, losses.

    `dense` holds the models `base` and `experts`. The oracle has a body's attention, norms and
    embeddings, and for each kind of text the MLPs of that expert.
    """
    model = load(dense / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {name: load(dense / name).state_dict() for name in experts}
    average = {name: torch.stack([s[name] for s in states.values()]).mean(0) for name in base}

    def losses(body: State, mlps: State, kinds: Texts) -> Losses:
        model.load_state_dict({n: (mlps if ".mlp." in n else body)[n] for n in base})
        return read(model, kinds)[0]

    def own(body: State | None) -> Losses:
        found: Losses = {}
        for kind, expert in states.items():
            found |= losses(expert if body is None else body, expert, {kind: texts[kind]})
        return found

    yield "base alone", "", losses(base, base, texts)
    yield "weight average", "", losses(average, average, texts)
    yield "each expert alone", "", own(None)
    yield "oracle", "base", own(base)
    yield "oracle", "average", own(average)


class Mixture:
    """A mixture loaded as it was written, which then takes other routers."""

    def __init__(self, directory: Path, texts: Texts):
        self.model, self.texts = load(directory), texts
        named = self.model.named_modules()
        self.routers = [module for name, module in named if ROUTER.search(f"{name}.weight")]
        self.experts: int = len(self.routers[0].weight)
        self.per_token: int = self.routers[0].top_k
        self.known: dict[bytes, tuple[Losses, Chosen]] = {}

    def read(self, file: Path) -> tuple[Losses, Chosen]:
        """The losses and first choices with the routers of `file`; the same ones are read once."""
        content = file.read_bytes()
        if content not in self.known:
            weights = dict(sorted((layer_of(name), w) for name, w in load_file(file).items()))
            self.known[content] = self._read(list(weights.values()), self.per_token)
        return self.known[content]

    def read_uniform(self) -> Losses:
        """The losses with all experts in equal parts."""
        return self._read([torch.zeros_like(r.weight) for r in self.routers], self.experts)[0]

    @torch.no_grad()
    def _read(self, weights: list[torch.Tensor], per_token: int) -> tuple[Losses, Chosen]:
        for router, weight in zip(self.routers, weights, strict=True):
            router.top_k = per_token
            router.weight.copy_(weight)
        return read(self.model, self.texts, self.experts)


def layer_of(name: str) -> int:
    """Which layer's router a tensor is; -1 if it is none."""
    found = ROUTER.search(name)
    return int(found[1]) if found else -1


def load(directory: Path) -> Any:
    """The model in float32, as it was written."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"{directory} does not load as it is: {info}")
    return model.eval()
