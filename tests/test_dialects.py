"""Every key of rope, windows, biases, heads and multipliers, as transformers 4 and 5 write it, for
every family: the mixture has the logits that transformers gives the dense model, or is refused.

python tests/test_dialects.py prints the table.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from babies import SIZES, make_tokenizer, save_weights, simple_config
from transformers import AutoConfig, AutoModelForCausalLM

from moemerge import InputError, make_plan, merge
from moemerge.config.schema import parse_config
from moemerge.families import ATTENTION, RECORDS

PROMPT = torch.tensor([[1, *range(3, 43)]])  # beyond every window, and the context of SHORT
SHORT = {"max_position_embeddings": 24}
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "glm": {"head_dim": 8, "pad_token_id": 0},
    "ernie4_5": {"head_dim": 8, "pad_token_id": 0},
    "helium": {"head_dim": 8, "pad_token_id": 0},
    "seed_oss": {"head_dim": 8, "pad_token_id": 0},
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
}  # fmt: skip
WINDOWED = ("mistral", "phi3", "qwen2", "qwen3")
LIMITED = ("ministral3", "olmo3")  # exact up to a length; see `test_limits`
FAMILIES = [
    name for name, record in RECORDS.items() if record.layers == ATTENTION and name not in LIMITED
]
LAYERS = SIZES["num_hidden_layers"]
FULL, SLIDING = ["full_attention"] * LAYERS, ["sliding_attention"] * LAYERS
MIXED = [FULL[0], SLIDING[0]]
ALL = "every family"


@dataclass(frozen=True)
class Row:
    """A config.json's keys under a `name`: `rope` in both dialects, `more` at the top of both.

    Where transformers cannot run it as it stands, `means` is what it says (None: just that). With
    `head` the file holds a head too, of that many times the embeddings.
    """

    name: str
    rope: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    families: Any = ALL
    means: dict[str, Any] | None = None
    head: float = 0.0


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LISTS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 6.0, 9.0]}
HALF = {"short_factor": [1.0, 1.5], "long_factor": [1.0, 3.0]}
LONG = {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 16}
TRAINED = {"original_max_position_embeddings": 16}


def without(rope: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key not in keys}


ROPES = [
    Row("nothing said"),
    Row("rope_theta", {"rope_theta": 500000.0}),
    Row("rope_theta, whole", {"rope_theta": 500000}),
    Row("linear", {"rope_type": "linear", "factor": 2.0}),
    Row("linear, by type", {"type": "linear", "factor": 2}),
    Row("dynamic", {"rope_type": "dynamic", "factor": 2.0}, SHORT),
    Row("dynamic, trained", {"rope_type": "dynamic", "factor": 2.0, **TRAINED}, SHORT),
    Row("yarn", YARN),
    Row("yarn, finetuned", {**YARN, "finetuned": True}),
    Row("yarn, whole context", without(YARN, "original_max_position_embeddings")),
    Row("yarn, factor null", {**YARN, "factor": None}),
    Row("yarn, attention_factor", {**YARN, "attention_factor": 1.7}),
    Row("yarn, beta", {**YARN, "beta_fast": 16, "beta_slow": 2.0}),
    Row("yarn, mscale", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    Row("yarn, mscale null", {**YARN, "mscale": None, "attention_factor": None}),
    Row("yarn, truncate", {**YARN, "truncate": False}),
    Row("yarn, trained at the top", {**YARN, "original_max_position_embeddings": 64}, TRAINED),
    Row("llama3", {**LLAMA3, "rope_theta": 500000.0}),
    Row("llama3, trained at the top", without(LLAMA3, "original_max_position_embeddings"), TRAINED),
    Row("llama3, both", {**LLAMA3, "original_max_position_embeddings": 64}, TRAINED),
    Row("longrope", LONG),
    Row("longrope, at the top", without(LONG, "original_max_position_embeddings"), TRAINED),
    Row("longrope, both", {**LONG, "original_max_position_embeddings": 64}, TRAINED),
    Row("longrope, whole context", without(LONG, "original_max_position_embeddings")),
    Row("longrope, attention_factor", {**LONG, "attention_factor": 1.3}, TRAINED),
    Row("longrope, factor", {**LONG, "factor": 16.0}, TRAINED),
    Row("longrope, su", {**without(LONG, "rope_type"), "type": "su"}, TRAINED,
        means={"rope_scaling": LONG, "rope_theta": 10000.0, **TRAINED}),
    Row("longrope, short lists", {**LONG, **HALF}, TRAINED),
    Row("longrope, a number", {**LONG, "short_factor": 2.0}, TRAINED),
    Row("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    Row("partial_rotary_factor 1", {"partial_rotary_factor": 1.0}),
    Row("partial_rotary_factor 1, linear",
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1}),
    Row("partial_rotary_factor, linear",
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
    Row("partial_rotary_factor, longrope",
        {**LONG, **HALF, "partial_rotary_factor": 0.5}, TRAINED),
    Row("partial_rotary_factor, odd", {"partial_rotary_factor": 0.4}),
    Row("partial_rotary_factor 0", {"partial_rotary_factor": 0}),
    Row("factor of text", {"rope_type": "linear", "factor": "2.0"}),
    Row("factor 0", {"rope_type": "linear", "factor": 0}),
    Row("factor missing", {"rope_type": "linear"}),
    Row("rope_theta of text", {"rope_theta": "10000.0"}),
    Row("a kind that nobody knows", {"rope_type": "spiral", "factor": 2.0}),
    Row("one set a kind of layer", {"full_attention": {"rope_type": "linear", "factor": 2.0}}),
    Row("... and layer_types", {"full_attention": {"rope_type": "linear", "factor": 2.0}},
        {"layer_types": FULL, "head_dim": 8}),
]  # fmt: skip
"""Each in each dialect."""

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LINEAR = {"rope_type": "linear", "factor": 2.0}
AT_THE_TOP = [
    Row("rope_theta null", {}, {"rope_theta": None}, means={}),
    Row("rope_scaling null", {}, {"rope_scaling": None, "rope_theta": 500000.0}),
    Row("rope_scaling empty", {}, {"rope_scaling": {}, "rope_parameters": LINEAR}),
    Row("rope_parameters null", {}, {"rope_parameters": None, "rope_theta": 500000.0}),
    Row("rope_theta twice", {}, {"rope_theta": 500.0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500000.0}}),
    Row("rope_theta twice, scaled", {}, {"rope_theta": 500.0, "rope_scaling": {
        **LINEAR, "rope_theta": 500000.0}}),
    Row("rope_theta elsewhere", {}, {"rope_scaling": LINEAR, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500000.0}}),
    Row("rope_scaling and rope_parameters", {}, {"rope_scaling": LINEAR, "rope_parameters": YARN}),
    Row("rope_type null", {}, {"rope_scaling": {**LINEAR, "rope_type": None, "type": "linear"}},
        means={"rope_scaling": LINEAR}),
    Row("partial_rotary_factor twice", {}, {"partial_rotary_factor": 0.5, "rope_parameters": {
        "rope_type": "default", "partial_rotary_factor": 1.0}}),
    Row("partial_rotary_factor null", {}, {"partial_rotary_factor": None}, means={}),
    Row("attention_bias", {}, {"attention_bias": True}),
    Row("attention_bias null", {}, {"attention_bias": None}, means={}),
    Row("attention_out_bias", {}, {"attention_out_bias": True}),
    Row("both biases off", {}, {"attention_bias": False, "attention_out_bias": False}),
    Row("mlp_bias", {}, {"mlp_bias": True}),
    Row("mlp_bias null", {}, {"mlp_bias": None}, means={}),
    Row("qkv_bias", {}, {"qkv_bias": True}),
    Row("qkv_bias false", {}, {"qkv_bias": False}),
    Row("o_bias", {}, {"o_bias": True, "qk_norm": "full", "post_norm": True}),
    Row("head_dim", {}, {"head_dim": 16}),
    Row("head_dim null", {}, {"head_dim": None}, means={"head_dim": 8}),
    Row("num_key_value_heads null", {}, {"num_key_value_heads": None},
        means={"num_key_value_heads": 4}),
    Row("tie_word_embeddings", {}, {"tie_word_embeddings": True}),
    Row("tie_word_embeddings, an equal head", {}, {"tie_word_embeddings": True}, head=1.0),
    Row("tie_word_embeddings, another head", {}, {"tie_word_embeddings": True}, head=0.5),
    Row("quantization_config", {}, {"quantization_config": BNB}, means={}),
    Row("compression_config", {}, {"compression_config": {"quant_method": "any"}}, means={}),
    Row("tie_word_embeddings null", {}, {"tie_word_embeddings": None}, means={}),
    Row("multipliers", {}, {"attention_multiplier": 0.5, "embedding_multiplier": 5.0,
                            "logits_scaling": 3.0, "residual_multiplier": 0.7}),
    Row("multipliers null", {}, dict.fromkeys(OWN["granite"]), means=dict.fromkeys(
        OWN["granite"], 1.0)),
    Row("other families' keys", {}, {"use_qk_norm": True, "norm_topk_prob": False, "n_group": 2,
                                     "routed_scaling_factor": 3.0, "num_experts": 7,
                                     "use_sliding_window": False, "clip_qkv": 1.0}),
    *[Row(f"{key} {said}", {}, {key: said}, means={key: None})
      for key in ("pad_token_id", "bos_token_id", "eos_token_id") for said in (-1, 64, None)],
    Row("eos_token_id a list", {}, {"eos_token_id": [2, 64]}, means={"eos_token_id": 2}),
    Row("eos_token_id of text", {}, {"eos_token_id": "2"}),
    Row("layer_types full", {}, {"layer_types": FULL, "head_dim": 8}),
    Row("layer_types attention", {}, {"layer_types": ["attention"] * LAYERS, "head_dim": 8}),
    Row("layer_types too few", {}, {"layer_types": FULL[:1], "head_dim": 8}),
    Row("layer_types null", {}, {"layer_types": None}, means={}),
]  # fmt: skip
"""Keys that no version of transformers says in another way; each once."""

IN_USE = {"use_sliding_window": True, "max_window_layers": 0}
WINDOWS = [
    Row("sliding_window absent", {}, IN_USE),
    *[Row(f"sliding_window {said}", {}, {**IN_USE, "sliding_window": said}) for said in (7, None)],
    Row("sliding_window 0", {}, {**IN_USE, "sliding_window": 0},
        means={**IN_USE, "sliding_window": None}),
    Row("sliding_window beyond the context", {}, {**IN_USE, "sliding_window": 4096}),
    Row("sliding_window of text", {}, {**IN_USE, "sliding_window": "7"}),
    Row("sliding_window, not in use", {}, {"use_sliding_window": False, "sliding_window": 7}),
    Row("sliding_window 0, not in use", {}, {"use_sliding_window": False, "sliding_window": 0},
        ("llama", "qwen2", "qwen3", "olmo2", "granite", "seed_oss")),
    Row("use_sliding_window null", {}, {"use_sliding_window": None, "sliding_window": 7},
        means={"use_sliding_window": False, "sliding_window": 7}),
    *[Row(f"max_window_layers {said}", {},
          {**IN_USE, "sliding_window": 7, "max_window_layers": said}) for said in (1, 2, 9)],
    Row("max_window_layers null", {}, {**IN_USE, "sliding_window": 7, "max_window_layers": None},
        means={**IN_USE, "sliding_window": 7, "max_window_layers": 28}),
    *[Row(f"window, layer_types {name}", {}, {**IN_USE, "sliding_window": 7, "layer_types": types,
                                              "head_dim": 8})
      for name, types in (("full", FULL), ("sliding", SLIDING), ("mixed", MIXED))],
    Row("layer_types sliding, not in use", {}, {"use_sliding_window": False, "sliding_window": 7,
                                                "layer_types": SLIDING, "head_dim": 8}),
    Row("layer_types sliding, no window", {}, {**IN_USE, "sliding_window": None,
                                               "layer_types": SLIDING, "head_dim": 8}),
    Row("window and partial_rotary_factor", {"partial_rotary_factor": 0.5},
        {**IN_USE, "sliding_window": 7}),
    Row("wide window and partial_rotary_factor", {"partial_rotary_factor": 0.5},
        {**IN_USE, "sliding_window": 4096}),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row in one dialect for one family: what config.json says."""

    family: str
    name: str
    dialect: str
    said: dict[str, Any]
    means: dict[str, Any]
    head: float = 0.0


def cases(family: str) -> Iterator[Case]:
    """Every row in its dialects, for one family."""
    own = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, **OWN.get(family, {})}
    for row in (*ROPES, *AT_THE_TOP, *WINDOWS):
        if row.families != ALL and family not in row.families:
            continue
        for dialect, said in spoken(row) if row.rope or row in ROPES else [("both", row.more)]:
            means = said if row.means is None else row.means
            yield Case(family, row.name, dialect, {**own, **said}, {**own, **means}, row.head)


def spoken(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the row says in the words of each version, and of both, as careful writers do."""
    theta = row.rope.get("rope_theta", 10000.0)
    scaling = without(row.rope, "rope_theta", "partial_rotary_factor") or None
    part = {k: v for k, v in row.rope.items() if k == "partial_rotary_factor"}
    four = {"rope_theta": theta, "rope_scaling": scaling, **part, **row.more}
    five = {"rope_theta": theta, "rope_type": row.rope.get("type", "default"), **row.rope}
    yield "4", four
    yield "5", {"rope_parameters": five, **row.more}
    yield "4 and 5", {**four, "rope_parameters": five}


class Bench:
    """Models of one family: weights are made once for each set of tensors, and merged once."""

    def __init__(self, root: Path, family: str):
        self.root, self.family = root, family
        self.sources: dict[Any, tuple[Path, dict[str, torch.Tensor]]] = {}
        self.mixtures: dict[Any, dict[str, torch.Tensor]] = {}
        self.seen: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}
        self.known: dict[Any, torch.Tensor] = {}

    def judge(self, case: Case) -> tuple[str, str]:
        """`equal` and the host, `refused` and why, or what is wrong and how."""
        try:
            path, dense = self.dense(case.means, case.head)
        except Exception as error:  # transformers' own refusal: there is nothing to be equal to
            path, *_ = self.dense({**SIZES, **OWN.get(self.family, {})})
            dense, why = None, f"{type(error).__name__}: {error}"
        said = {"model_type": self.family, **case.said}
        (path / "config.json").write_text(json.dumps(said))
        text = simple_config(path, [path, path], "gate_mode: zeros")
        try:
            plan = make_plan(parse_config(text)).plan
        except InputError as error:
            return "refused", "; ".join(problem.what for problem in error.problems)
        if dense is None:
            return "taken", f"{plan.architecture}, but transformers refuses the dense model ({why})"
        key = (path, tuple((t.name, t.recipe) for t in plan.tensors))
        if key not in self.mixtures:
            out = path.with_name(f"{path.name}-{len(self.mixtures)}")
            merge(parse_config(text), out)
            assert json.loads((out / "config.json").read_text()) == plan.config
            model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(info.values()), info
            self.mixtures[key] = model.state_dict()
        made = self.logits(AutoConfig.for_model(**plan.config), key, self.mixtures[key])
        far = float((made - dense).abs().max())
        return ("equal" if far <= 2e-5 else "wrong"), f"{plan.architecture}, {far:.0e}"

    def dense(self, said: dict[str, Any], head: float = 0.0) -> tuple[Path, torch.Tensor]:
        """Weights of the dense model that config.json describes, and its logits."""
        written = self.root / "config.json"
        written.write_text(json.dumps({"model_type": self.family, **said}))
        config = AutoConfig.from_pretrained(self.root)
        text = json.dumps([config.to_dict(), head], default=str)
        if text not in self.seen:
            self.seen[text] = self.source(config, head)
        path, state = self.seen[text]
        if head:  # which transformers is to judge
            model = AutoModelForCausalLM.from_pretrained(path, config=config)
            state = model.state_dict()
        return path, self.logits(config, path, state)

    def source(self, config: Any, head: float) -> tuple[Path, dict[str, torch.Tensor]]:
        """A directory with weights for such a model, and the weights."""
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
        tied = bool(config.tie_word_embeddings)
        key = (head or tied, tuple(shapes.items()))
        if key not in self.sources:
            draw = torch.Generator().manual_seed(len(shapes))
            state = {
                name: torch.randn(shape, generator=draw) * 0.2 + ("norm" in name)
                for name, shape in shapes.items()
            }
            if tied:
                state["lm_head.weight"] = state["model.embed_tokens.weight"] * (head or 1.0)
            path = self.root / str(len(self.sources))
            path.mkdir()
            left_out = {"lm_head.weight"} if tied and not head else set()
            save_weights(path, {n: t for n, t in state.items() if n not in left_out})
            make_tokenizer(path)
            (path / "generation_config.json").write_text("{}")  # else transformers looks for one
            self.sources[key] = path, state
        return self.sources[key]

    def logits(self, config: Any, key: Any, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of a model with the weights that are known by the `key`."""
        key = (key, json.dumps(config.to_dict(), default=str))
        if key not in self.known:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            model.load_state_dict(state, assign=True)
            model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
            with torch.inference_mode():
                self.known[key] = model.eval()(PROMPT, use_cache=False).logits
            assert not self.known[key].isnan().any()
        return self.known[key]


def check(root: Path, family: str, own: list[Case]) -> None:
    bench = Bench(root, family)
    found = {(case.name, case.dialect): bench.judge(case) for case in own}
    wrong = {key: what for key, what in found.items() if what[0] not in ("equal", "refused")}
    assert not wrong
    equal = [key for key, (verdict, _) in found.items() if verdict == "equal"]
    assert len(equal) > len(found) / 3  # the rest of the keys are refused by their names


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_or_refused(tmp_path: Path, family: str) -> None:
    """Half of the rows, the others for the next family; of each dialect every second family's."""
    number = list(RECORDS).index(family)
    dialects = ("both", "45"[number // 2 % 2])
    own = [case for case in cases(family) if case.dialect in dialects]
    check(tmp_path, family, own[number % 2 :: 2])


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_or_refused_in_every_dialect(tmp_path: Path, family: str) -> None:
    check(tmp_path, family, list(cases(family)))


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    totals: Counter[str] = Counter()
    for one in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(Path(directory), one)
            for case in cases(one):
                verdict, told = bench.judge(case)
                totals[verdict] += 1
                print(f"{one:9} {case.name:40} {case.dialect:8} {verdict:8} {told[:150]}")
    print(f"{totals.total()} rows:", ", ".join(f"{n} {what}" for what, n in totals.items()))
