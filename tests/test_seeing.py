"""Mixtures that see: the vision tower stays, byte for byte, and pictures are read as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from babies import make_model, simple_config, write_config
from kinds import make_kind
from PIL import Image
from seeing import IMAGE, SEEING, make_seeing, picture
from stand_ins import make_qwen3_5_27b
from test_kinds import tensors
from transformers import (
    AutoModelForImageTextToText,
    Gemma4ImageProcessorPil,
    Qwen2VLImageProcessorPil,
)

from moemerge import (
    InputError,
    Options,
    drop,
    extract,
    make_plan,
    merge,
    routing_report,
    verify_checkpoint,
)
from moemerge.plan import arithmetic
from moemerge.text import Pictures

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")
QWEN_MARKS = {
    "vision_start_token": (62, "<|vision_start|>"),
    "vision_end_token": (63, "<|vision_end|>"),
    "image_token": (IMAGE, "<|image_pad|>"),
    "video_token": (61, "<|video_pad|>"),
}
GEMMA_MARKS = {
    "boi_token": (62, "<|image>"),
    "eoi_token": (63, "<image|>"),
    "image_token": (IMAGE, "<|image|>"),
    "video_token": (61, "<|video|>"),
    "audio_token": (59, "<|audio|>"),
    "boa_token": (57, "<|audio>"),
    "eoa_token": (58, "<audio|>"),
}
"""The tokens about a picture: number and text."""

CHANGED = [kind for kind in SEEING if kind != "qwen3 vl"]
"""The kinds whose mixtures can be taken apart again."""


def load(directory: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.float().eval()


def logits(directory: Path, kind: str) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load(directory)(**picture(kind)).logits
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", SEEING)
def test_identity_with_a_picture(tmp_path: Path, kind: str, tied: bool) -> None:
    base = make_seeing(tmp_path / "base", kind, tied)
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [base] * 4)), tmp_path / "out")
    wanted, found = logits(base, kind), logits(tmp_path / "out", kind)
    limit = 1e-4 if kind == "gemma4" else 1e-5
    assert (wanted - found).abs().max() <= limit * wanted.abs().max()
    blind = picture(kind) | {"pixel_values": torch.zeros_like(picture(kind)["pixel_values"])}
    with torch.inference_mode():
        assert (load(base)(**blind).logits - wanted).abs().max() > 1e-2  # it looks


@pytest.mark.parametrize("kind", SEEING)
def test_all_beside_the_language_part_is_the_bases(tmp_path: Path, kind: str) -> None:
    base, *experts = (make_seeing(tmp_path / str(n), kind, seed=n) for n in range(3))
    for name in ("preprocessor_config.json", "processor_config.json"):
        (base / name).write_text('{"image_mean": [0.5]}')
    text = simple_config(base, experts, "dtype: bfloat16")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    had, has = tensors(base), tensors(tmp_path / "out")
    beside = [name for name in had if "language_model" not in name and name != "lm_head.weight"]
    assert len(beside) > 20
    for name in beside:
        assert torch.equal(had[name], has[name]) and had[name].dtype == has[name].dtype, name
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    checked = verify_checkpoint(tmp_path / "out")
    assert checked.compared >= len(beside)
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card and "vllm serve" not in card
    was, made = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
    assert made["vision_config"] == was["vision_config"]


@pytest.mark.parametrize("kind", CHANGED)
def test_such_a_mixture_is_changed_and_taken_apart(tmp_path: Path, kind: str) -> None:
    base, other = (make_seeing(tmp_path / str(n), kind, seed=n) for n in range(2))
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [base, other])), tmp_path / "out")
    extract(tmp_path / "out", 0, tmp_path / "dense")
    assert torch.equal(logits(base, kind), logits(tmp_path / "dense", kind))
    drop(tmp_path / "out", 1, tmp_path / "one")
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [base])), tmp_path / "wanted")
    one, wanted = tensors(tmp_path / "one"), tensors(tmp_path / "wanted")
    assert one.keys() == wanted.keys()
    load(tmp_path / "one")


def test_what_is_stored_transposed_is_not_taken_apart(tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "qwen3 vl")
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [base] * 2)), tmp_path / "out")
    with pytest.raises(InputError, match="stored transposed"):
        extract(tmp_path / "out", 0, tmp_path / "dense")


def test_experts_that_only_read_text_are_matched_by_their_language_part(tmp_path: Path) -> None:
    base, text = make_seeing(tmp_path / "base", "qwen3.5"), make_kind(tmp_path / "t", "qwen3.5")
    merge(write_config(tmp_path / "a.yaml", simple_config(base, [text, base])), tmp_path / "a")
    merge(write_config(tmp_path / "b.yaml", simple_config(text, [text, base])), tmp_path / "b")
    sees, reads = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    part = "layers.0.mlp.experts.down_proj"
    assert torch.equal(sees[f"model.language_model.{part}"], reads[f"model.{part}"])
    assert any("visual" in name for name in sees) and not any("visual" in name for name in reads)


def test_a_qwen3_is_an_expert_of_a_qwen3_vl(tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "qwen3 vl")
    sizes = {**SEEING["qwen3 vl"]["text_config"]}
    for key in ("model_type", "rope_parameters"):
        del sizes[key]
    reads = make_model(tmp_path / "reads", "qwen3", **sizes)
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [reads, base])), tmp_path / "out")
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    wanted = tensors(reads)["model.layers.1.mlp.down_proj.weight"].T
    assert torch.equal(tensors(tmp_path / "out")[name][0], wanted)


def test_shapes_that_lie_both_ways_are_refused(tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "qwen3 vl")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 24
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="readers take for their transpose"):
        make_plan(write_config(tmp_path / "c.yaml", simple_config(base, [base] * 2)))


def test_a_transposed_tensor_is_the_same_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that end within a row, in bands of two rows, and with noise on it."""
    base = make_seeing(tmp_path / "base", "qwen3 vl")
    text = simple_config(base, [base] * 2, per_expert="noise_scale: 0.01")
    ready = make_plan(write_config(tmp_path / "c.yaml", text))
    sources = {name: one.tensors for name, one in ready.checkpoints.items()}
    [tensor] = [t for t in ready.plan.tensors if t.name.endswith("layers.1.mlp.experts.down_proj")]
    whole, pieces = bytearray(tensor.nbytes), bytearray(tensor.nbytes)

    def fill(view: memoryview, start: int) -> None:
        arithmetic.fill(
            view, start, tensor.name, tensor.shape, tensor.dtype, tensor.recipe, sources
        )

    fill(memoryview(whole), 0)
    monkeypatch.setattr(arithmetic, "_BAND_BYTES", 2 * 40 * 4)
    for at in range(0, len(pieces), 1000):
        fill(memoryview(pieces)[at : at + 1000], at)
    assert whole == pieces
    values = torch.frombuffer(whole, dtype=torch.float32).reshape(tensor.shape)
    noise = values[0] - tensors(base)["model.language_model.layers.1.mlp.down_proj.weight"].T
    assert 0.005 < noise.std() < 0.02


def draw(file: Path, kind: str, seed: int) -> Path:
    """A chart, bars on white, or a photograph, which is soft noise."""
    draws = np.random.default_rng(seed)
    if kind == "chart":
        pixels = np.full((24, 24, 3), 255, np.uint8)
        for bar in range(4):
            pixels[24 - draws.integers(4, 22) :, 6 * bar : 6 * bar + 4] = draws.integers(0, 200, 3)
    else:
        soft = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels = np.asarray(soft.resize((24, 24), Image.Resampling.BICUBIC))
    Image.fromarray(pixels).save(file)
    return file


def add_processor(model: Path, kind: str) -> None:
    """The processor that such a model comes with, for its small patches."""
    data = json.loads((model / "tokenizer.json").read_text())
    marks = GEMMA_MARKS if kind == "gemma4" else QWEN_MARKS
    for number, text in marks.values():
        data["model"]["vocab"] = {w: n for w, n in data["model"]["vocab"].items() if n != number}
        data["added_tokens"].append({
            "id": number, "content": text, "special": True, "normalized": False, "lstrip": False,
            "rstrip": False, "single_word": False,
        })  # fmt: skip
        data["model"]["vocab"][text] = number
    (model / "tokenizer.json").write_text(json.dumps(data))
    if kind == "gemma4":  # one file, as on the Hub
        told = json.loads((model / "tokenizer_config.json").read_text())
        told["extra_special_tokens"] = {name: text for name, (_, text) in marks.items()}
        (model / "tokenizer_config.json").write_text(json.dumps({**told, "pad_token": "<s>"}))
        eyes = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
        said = {"processor_class": "Gemma4Processor", "image_processor": eyes.to_dict()}
        (model / "processor_config.json").write_text(json.dumps(said))
        return
    made = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 1024},
    )  # fmt: skip
    made.save_pretrained(model)
    said = json.loads((model / "preprocessor_config.json").read_text())
    said["processor_class"] = "Qwen3VLProcessor"
    (model / "preprocessor_config.json").write_text(json.dumps(said))


def with_pictures(root: Path, models: list[Path]) -> str:
    """A config with six charts for the first expert and six photographs for the second."""
    lines = [f"base_model: {models[0]}", "gate_mode: ridge", "experts_per_token: 1", "experts:"]
    for kind, model in zip(("chart", "photograph"), models[1:], strict=True):
        lines += [f"  - source_model: {model}", "    positive_prompts:"]
        for number in range(6):
            draw(root / f"{kind}{number}.png", kind, number)
            lines.append(f"      - {{image: {kind}{number}.png, text: explain the}}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", SEEING)
def test_pictures_of_a_kind_find_their_expert(tmp_path: Path, kind: str) -> None:
    """Routers that ridge made of pictures choose the right expert for most other pictures."""
    models = [make_seeing(tmp_path / str(n), kind, seed=n) for n in range(3)]
    add_processor(models[0], kind)
    config = write_config(tmp_path / "c.yaml", with_pictures(tmp_path, models))
    merge(config, tmp_path / "out")
    merge(config, tmp_path / "lazy", Options(lazy=True))
    assert all(
        torch.equal(tensor, tensors(tmp_path / "lazy")[name])
        for name, tensor in tensors(tmp_path / "out").items()
    )
    model, chosen = load(tmp_path / "out"), list[torch.Tensor]()
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "router")):
            module.register_forward_hook(lambda _, args, out: chosen.append(out[0]))
    eyes, right = Pictures(models[0]), []
    for number in range(100, 110):
        for expert, what in enumerate(("chart", "photograph")):
            prompt = eyes.encode(draw(tmp_path / "new.png", what, number), "explain the")
            chosen.clear()
            with torch.inference_mode():
                model(input_ids=torch.tensor([prompt.ids]), **prompt.seen.given)
            scores = torch.stack([one.reshape(len(prompt.ids), 2) for one in chosen])
            right.append(int(scores.softmax(-1).mean((0, 1)).argmax()) == expert)
    assert sum(right) >= 0.9 * len(right)
    passage = routing_report(tmp_path / "out")["passages"][0]
    shown = [token.strip() for token in passage["tokens"]]
    mark, parts = ("<|image|>", 64) if kind == "gemma4" else ("<|image_pad|>", 9)
    assert shown.count(mark) == parts and shown[-1] == "the"


def test_a_picture_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_seeing(tmp_path / str(n), "qwen3.5", seed=n) for n in range(3)]
    text = with_pictures(tmp_path, models)
    with pytest.raises(InputError, match="its processor cannot be read"):
        make_plan(write_config(tmp_path / "c.yaml", text))
    add_processor(models[0], "qwen3.5")
    with monkeypatch.context() as hidden:
        hidden.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"pip install 'moemerge\[vision\]'"):
            make_plan(write_config(tmp_path / "c.yaml", text))
    (tmp_path / "chart3.png").write_text("no picture")
    with pytest.raises(InputError, match=r"chart3.png cannot be read as a picture"):
        make_plan(write_config(tmp_path / "c.yaml", text))
    Image.new("RGB", (2000, 3)).save(tmp_path / "chart3.png")  # too long for its processor
    with pytest.raises(InputError, match=r"chart3.png cannot be read as a picture"):
        make_plan(write_config(tmp_path / "c.yaml", text))
    blind = [make_kind(tmp_path / f"t{n}", "qwen3.5", seed=n) for n in range(3)]
    with pytest.raises(InputError, match="the base model reads text alone"):
        make_plan(write_config(tmp_path / "c.yaml", with_pictures(tmp_path, blind)))
    text = with_pictures(tmp_path, models).replace("ridge", "cheap_embed")
    with pytest.raises(InputError, match="cannot use prompts with pictures"):
        make_plan(write_config(tmp_path / "c.yaml", text))


def test_a_plan_of_true_size_has_the_right_numbers(tmp_path: Path) -> None:
    """Four Qwen 3.5 27B with their vision towers, from headers alone."""
    models = [tmp_path / f"model{number}" for number in range(4)]
    for model in models:
        make_qwen3_5_27b(model)
    text = simple_config(models[0], models, "experts_per_token: 2\ngate_mode: random")
    plan = make_plan(write_config(tmp_path / "c.yaml", text)).plan
    layers, hidden, inner = 64, 5120, 17408
    mlp = 3 * hidden * inner
    dense = sum(at.parameters for at in plan.tensors if at.expert is None and not at.made)
    shared, routers = layers * (3 * 32 + 1) * hidden, layers * 4 * hidden
    index = json.loads((models[0] / "model.safetensors.index.json").read_text())
    # The class needs a shared expert beside: 32 neurons and a gate in each layer.
    assert dense - shared == index["metadata"]["total_size"] // 2 - layers * mlp
    assert plan.parameters == dense + layers * 4 * mlp + routers
    assert plan.active_parameters == dense + layers * 2 * mlp + routers
    headers = sum(len(shard.header()) for shard in plan.shards)
    assert plan.nbytes == 2 * plan.parameters + headers
    assert sum("visual" in tensor.name for tensor in plan.tensors) == 27 * 12 + 9
