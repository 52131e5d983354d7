"""Random chains of edits: after each the mixture verifies, loads whole, computes what it is to.

Experts are the base model with its neurons in other orders: other bytes, the same function. So
whatever is merged, added, dropped or chosen, the logits are the base model's, and who is in the
mixture shows in the bytes alone. What a split computes is what splitting anew computes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from babies import make_model, make_tokenizer, save_weights, simple_config, write_config
from test_take_apart import HOSTS, SMALL, files, head_of, logits, same, weights
from transformers import AutoModelForCausalLM

from moemerge import InputError, Options, merge, regate, verify_checkpoint
from moemerge.architectures import types
from moemerge.mixture.edit import add, drop, top_k
from moemerge.mixture.extraction import extract
from moemerge.mixture.repairing import repair

CLASSES = ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoehybrid", "glm4_moe")
KINDS = ("whole", "whole", "whole", "whole", "segments", "split")
STEPS = ("add", "drop", "drop", "top_k", "top_k", "extract", "repair", "saved_again", "regate")
POOL, SLICES = 5, 4
SAMPLE = (0, 4, 5)
CHAINS = [
    pytest.param(
        name, chain, marks=() if chain in SAMPLE else pytest.mark.full,
        id=f"{name}-{chain}-{KINDS[chain]}",
    )
    for name in CLASSES for chain in range(len(KINDS))
]  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Of each family the base, and the same with its neurons in other orders."""
    root, made = tmp_path_factory.mktemp("pool"), {}
    for family in {HOSTS[name] for name in CLASSES}:
        base = make_model(root / f"{family}-0", family, tie_word_embeddings=family == "qwen3")
        made[family] = [base]
        for number in range(1, POOL):
            made[family].append(root / f"{family}-{number}")
            shutil.copytree(base, made[family][-1])
            order = torch.randperm(48, generator=torch.Generator().manual_seed(number))
            state = {
                name: tensor[:, order] if "down_proj" in name else tensor[order]
                if ".mlp." in name else tensor for name, tensor in weights(base).items()
            }  # fmt: skip
            save_weights(made[family][-1], {name: t.contiguous() for name, t in state.items()})
    return made


class Chain:
    """A mixture on its way: what it is now, and what it must be."""

    def __init__(self, name: str, chain: int, root: Path, models: list[Path]):
        self.name, self.root, self.models = name, root, models
        self.kind, self.draw = KINDS[chain], random.Random(f"{name} {chain}")
        self.pieces = 2 if self.kind == "segments" else 1
        self.sigmoid = types.find(name).SCORES == "sigmoid"
        self.members = [1, 2, 0] if self.kind != "split" else list(range(SLICES))
        self.per_token, self.made, self.dense = 2, 0, logits(models[0])
        self.manifest = self.as_merged = True
        self.moe = self.new()
        merge(self.config(), self.moe, SMALL)
        self.check()

    def new(self) -> Path:
        self.made += 1
        return self.root / str(self.made)

    def config(self) -> Path:
        if self.kind == "split":
            return self.split_config(self.per_token)
        base, *_ = self.models
        text = simple_config(base, [self.models[one] for one in self.members], head_of(self.name))
        text = text.replace("experts_per_token: 2", f"experts_per_token: {self.per_token}")
        text = f"segments: {self.pieces}\n{text}" if self.pieces > 1 else text
        return write_config(self.root / "c.yaml", text)

    def split_config(self, per_token: int) -> Path:
        text = f"base_model: {self.models[0]}\narchitecture: {self.name}\ngate_mode: random\n"
        text += f"experts_per_token: {per_token}\nsplit: {{slices: {SLICES}, assign: kmeans}}\n"
        return write_config(self.root / "s.yaml", text)

    def expected(self) -> torch.Tensor:
        if self.kind != "split":
            return self.dense
        anew = self.root / f"anew-{self.per_token}"
        if not anew.exists():
            merge(self.split_config(self.per_token), anew, SMALL)
        return logits(anew)

    def check(self) -> None:
        """It is whole, loads without a word, and computes what it must."""
        if self.manifest:
            verify_checkpoint(self.moe)
        config = json.loads((self.moe / "config.json").read_text())
        counts = [config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts")
                  if key in config]  # fmt: skip
        assert set(counts) == {len(self.members) * self.pieces}
        assert config["num_experts_per_tok"] == self.per_token * self.pieces
        assert (logits(self.moe) - self.expected()).abs().max() <= 1e-5

    def refused(self, what: str, edit: Callable[[Path], object]) -> None:
        before, out = files(self.moe), self.new()
        with pytest.raises(InputError, match=what):
            edit(out)
        assert not out.exists() and files(self.moe) == before

    def add(self) -> None:
        left = [n for n in range(POOL) if n not in self.members]
        model = str(self.models[left[0] if left else 0])
        if self.kind != "whole":
            self.refused("are parts", lambda out: add(str(self.moe), model, out))
        elif len(self.members) == 1:
            self.refused("has one expert", lambda out: add(str(self.moe), model, out))
        elif left:
            out = self.new()
            add(str(self.moe), model, out)
            self.moe, self.manifest = out, True
            self.members.append(left[0])

    def drop(self) -> None:
        count = len(self.members)
        number = self.draw.randrange(count)
        if self.kind == "split":
            self.refused("slices", lambda out: drop(str(self.moe), str(number), out))
        elif (count - 1) * self.pieces < 1 + self.sigmoid:
            self.refused("expert", lambda out: drop(str(self.moe), str(number), out))
        else:
            out = self.new()
            drop(str(self.moe), str(number), out)
            del self.members[number]
            self.moe, self.manifest = out, True
            self.per_token = min(self.per_token, count - 1)

    def top_k(self) -> None:
        count = len(self.members)
        self.refused("cannot be chosen", lambda out: top_k(str(self.moe), 99, out))
        if self.pieces > 1:
            self.refused("segments", lambda out: top_k(str(self.moe), 1, out))
        chosen = self.draw.randint(1, count)
        if self.draw.random() < 0.5:
            out = self.new()
            top_k(str(self.moe), chosen * self.pieces, out)
            self.moe, self.manifest = out, True
        elif self.kind == "split" and not self.sigmoid and chosen != self.per_token:
            self.refused("OUT", lambda out: top_k(str(self.moe), chosen))
            chosen = self.per_token
        else:
            top_k(str(self.moe), chosen * self.pieces)
        self.per_token = chosen

    def extract(self) -> None:
        number, out = self.draw.randrange(len(self.members)), self.new()
        if self.kind != "whole":
            self.refused("are parts", lambda o: extract(str(self.moe), str(number), o))
        else:
            extract(str(self.moe), str(number), out)
            verify_checkpoint(out)
            assert same(weights(out), weights(self.models[self.members[number]]))
            assert (logits(out) - self.dense).abs().max() <= 1e-5

    def repair(self) -> None:
        out = self.new()
        if repair(str(self.moe), out):
            self.moe, self.manifest = out, True
        else:
            assert not out.exists()

    def saved_again(self) -> None:
        """As training with transformers 5 leaves it."""
        out = self.new()
        AutoModelForCausalLM.from_pretrained(self.moe).save_pretrained(out)
        make_tokenizer(out)
        self.moe, self.manifest, self.as_merged = out, False, False

    def regate(self) -> None:
        if self.kind == "split" or not self.as_merged:
            why = "split|moemerge.json|other weights"
            self.refused(why, lambda out: regate(self.moe, self.config()))
        else:
            self.per_token = self.draw.randint(1, len(self.members))
            regate(self.moe, self.config(), Options(seed=self.draw.randrange(99)))


@pytest.mark.parametrize(("name", "chain"), CHAINS)
def test_after_every_edit_it_computes_what_it_is_to(
    name: str, chain: int, pool: dict[str, list[Path]], tmp_path: Path
) -> None:
    made = Chain(name, chain, tmp_path, pool[HOSTS[name]])
    for step in made.draw.sample(STEPS, len(STEPS)):
        getattr(made, step)()
        made.check()
