"""Adapters, averaged bodies, training and evaluation with layers that are not all attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from babies import make_adapter, simple_config, write_config
from kinds import make_kind
from test_kinds import PROMPT, is_body, load, tensors
from transformers import AutoModelForCausalLM

from moemerge import EvalSpec, Tuning, evaluate, merge, routing_report, tune, verify_checkpoint

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")

SOME = [
    "qwen3.5", "gemma4 shares keys", "lfm2", "cohere2", "granite4 mamba", "hunyuan", "smollm3",
]  # fmt: skip
ALSO = [*SOME, "nemotron-h"]


@pytest.mark.parametrize("kind", ALSO)
def test_an_adapter_is_merged_into_an_expert(tmp_path: Path, kind: str) -> None:
    """Experts that are all the base and an adapter compute what PEFT's merged model computes."""
    from peft import PeftModel

    base = make_kind(tmp_path / "base", kind)
    targets = r".*(gate_proj|up_proj|down_proj|w1|w2|w3|input_linear|output_linear)"
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=targets)
    text = simple_config(base, [f"{base}+{adapter}"] * 2)
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base).float()
    dense = PeftModel.from_pretrained(plain, adapter).merge_and_unload().eval()
    with torch.inference_mode():
        wanted, found = dense(PROMPT).logits, load(tmp_path / "out")(PROMPT).logits
        assert (load(base)(PROMPT).logits - wanted).abs().max() > 1e-3
    assert (wanted - found).abs().max() <= 1e-4 * wanted.abs().max()
    verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("kind", ALSO)
def test_a_body_is_the_average_of_the_experts(tmp_path: Path, kind: str) -> None:
    base, one, two = (make_kind(tmp_path / str(n), kind, seed=n) for n in range(3))
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [one, two], "body: average")),
          tmp_path / "out")  # fmt: skip
    had, has = [tensors(model) for model in (one, two)], tensors(tmp_path / "out")
    bodies = [name for name in has if name in had[0] and is_body(name)]
    assert len(bodies) > 10
    for name in bodies:
        wanted = (had[0][name].float() + had[1][name].float()) / 2
        assert torch.allclose(has[name].float(), wanted, atol=1e-6), name


@pytest.mark.parametrize("kind", SOME)
def test_such_a_mixture_is_read_measured_and_tuned(tmp_path: Path, kind: str) -> None:
    base, one, two = (make_kind(tmp_path / str(n), kind, seed=n) for n in range(3))
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [one, two])), tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("code python function return story dragon castle maths number sum\n" * 8)
    report = routing_report(tmp_path / "out", {"some": text})
    assert len(report["passages"]) and report["layers"] > 1
    made = evaluate(tmp_path / "out", EvalSpec(texts={"some": text}))
    assert made["rows"][0]["values"][0] > 1
    before = tensors(tmp_path / "out")
    tune(tmp_path / "out", Tuning(data=(text,), steps=4, batch=2, length=16))
    after = tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("router" in name or ".gate." in name for name in changed)
