"""Mixtures of GGUF files: their bytes are copied, and llama.cpp says what the dense file says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from babies import make_adapter, simple_config, write_config
from fake_hub import FakeHub
from gguf_files import (
    KINDS,
    TINY,
    as_dense_file,
    convert,
    libraries,
    make_wide,
    quantise,
    write_imatrix,
)
from safetensors.torch import load_file, save_file
from smollm2 import model_dir
from test_readers import asked, read_all
from tokenizers import Tokenizer

from moemerge import (
    InputError,
    Options,
    ReadError,
    VerifyError,
    export,
    make_plan,
    merge,
    verify_checkpoint,
)
from moemerge.checkpoint import read_rows
from moemerge.checkpoint.gguf import quantise as quantiser
from moemerge.checkpoint.gguf.header import Header, read_header
from moemerge.output import write as writing

__all__ = ["asked"]

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 is enough")

# llama.cpp wants a token `</s>` of a model with `phi3` in its name.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"family": "qwen3", "head_dim": 64},
    "qwen2": {"family": "qwen2"},
    "granite": {
        "family": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "logits_scaling": 2.0, "attention_multiplier": 0.2,
    },
    "phi": {"family": "phi3", "original_max_position_embeddings": 512},
    "lfm2": {
        "family": "lfm2", "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": True, "block_auto_adjust_ff_dim": False,
    },
    "cohere2": {
        "family": "cohere2", "tie_word_embeddings": True, "sliding_window": 8, "rotary_pct": 1.0,
        "num_hidden_layers": 4, "logit_scale": 0.5,
    },
}  # fmt: skip
HYBRIDS = ("lfm2", "cohere2")
"""Families whose layers are not all a Llama's."""

PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, by the sea,"]


@pytest.fixture(scope="module")
def dense(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of each family: a model (`llama`), another of the same shapes, and their F16 files."""
    root, pairs = tmp_path_factory.mktemp("dense"), list[tuple[Path, Path]]()
    for family, settings in FAMILIES.items():
        for number in range(2):
            directory = make_wide(root / f"{family}{number}", number, **settings)
            file = root / f"{family}{number}.gguf"
            if family == "qwen2":
                as_dense_file(directory, file, family)
            else:
                pairs.append((directory, file))
    convert(pairs)
    yield root
    shutil.rmtree(root)


def of(dense: Path, family: str, kind: str, number: int = 0) -> Path:
    """The file of that kind."""
    file = dense / f"{family}{number}.gguf"
    if kind == "f16":
        return file
    made = dense / f"{family}{number}-{kind}.gguf"
    return made if made.exists() else quantise(file, made, kind)


def tensor_bytes(path: Path, header: Header, name: str) -> bytes:
    at = header.tensors[name]
    with path.open("rb") as file:
        file.seek(at.offset)
        return file.read(at.nbytes)


def config_of(root: Path, base: Path, experts: list[Path], head: str = "") -> Path:
    return write_config(root / "c.yaml", simple_config(base, list(experts), head))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_that_it_was_made_of(tmp_path: Path, dense: Path, family: str) -> None:
    """F16 files give the same bytes as the models in transformers' format, and the same routers."""
    settings = "dtype: float16\ngate_mode: ridge"
    for name, suffix in (("a", ""), ("b", ".gguf")):
        models = [dense / f"{family}{number}{suffix}" for number in range(2)]
        merge(config_of(tmp_path, models[0], models, settings), tmp_path / name)
    ours, theirs = (load_all(tmp_path / name) for name in ("b", "a"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "gate.weight" in name or "router" in name:
            assert torch.allclose(ours[name].float(), tensor.float(), rtol=0.2, atol=1e-3), name
        else:
            assert torch.equal(ours[name], tensor), name
    one, other = (Tokenizer.from_file(str(tmp_path / n / "tokenizer.json")) for n in "ab")
    for text in (*PROMPTS, "<|im_start|>user\n12345 ünïcödé 日本<|im_end|>"):
        assert one.encode(text).ids == other.encode(text).ids
    assert verify_checkpoint(tmp_path / "b").compared


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


Case = tuple[str, str, int, int]
USUAL = ("f16", "q8_0", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs")
COPIED: list[Case] = [
    *(("llama", kind, 2, 2) for kind in USUAL),
    *(("qwen3", kind, 3, 2) for kind in ("f16", "q4_k_m")),
    *(("granite", kind, 2, 1) for kind in ("f16", "q4_k_m")),
    *(("qwen2", kind, 2, 2) for kind in ("f16", "q4_k_m")),
    ("phi", "q4_k_m", 2, 2), ("cohere2", "q4_k_m", 2, 1),
    *(("lfm2", kind, 2, 2) for kind in ("f16", "q4_k_m")),
    ("llama", "q4_k_m", 3, 1), ("llama", "q5_k_m", 4, 2), ("llama", "q4_k_m", 8, 2),
]  # fmt: skip
RARE: list[Case] = [
    *(("llama", kind, 2, 2) for kind in KINDS if kind not in USUAL),
    *(("qwen3", kind, 4, 1) for kind in ("q8_0", "q5_k_m", "iq4_xs")),
    *((family, kind, 3, 2) for family in ("phi", *HYBRIDS) for kind in ("f16", "q8_0", "iq4_xs")),
]


@pytest.mark.parametrize("cases", [COPIED, pytest.param(RARE, marks=pytest.mark.full)])
def test_experts_are_copied_and_llama_cpp_says_what_the_dense_file_says(
    tmp_path: Path, smollm2: Path, dense: Path, cases: list[Case]
) -> None:
    """All in one test: to start llama.cpp takes longer than to ask it."""
    made = dict[Path, list[Path]]()
    for number, (family, kind, count, per_token) in enumerate(cases):
        file, out = of(dense, family, kind), tmp_path / f"{number}.gguf"
        head = f"experts_per_token: {per_token}\ngate_mode: random"
        merged = merge(config_of(tmp_path, file, [file] * count, head), out)
        assert merged.written == out.stat().st_size
        check_copies(file, out, count, per_token)
        assert verify_checkpoint(out).compared
        made.setdefault(file, []).append(out)
    for number, (file, outs) in enumerate(made.items()):
        first, *others = said_by([file, *outs], tmp_path / f"said{number}")
        for other in others:
            agree(first, other, 0.2 if "-q" in file.name or "-i" in file.name else 0.01)


def check_copies(file: Path, out: Path, count: int, per_token: int) -> None:
    was, now = read_header(file), read_header(out)
    for name, at in was.tensors.items():
        row = len(own := tensor_bytes(file, was, name)) // at.shape[0]
        if ".ffn_" not in name or name.endswith("ffn_norm.weight"):
            parts = [name]
            if "attn_qkv" in name:
                parts = [name.replace("qkv", which) for which in "qkv"]
            assert all(now.tensors[part].encoding == at.encoding for part in parts)
            made = b"".join(tensor_bytes(out, now, part) for part in parts)
            if file.name.startswith(("qwen2", "phi")) and "attn_" in name:
                own, made = (  # rows in another order, each byte for byte
                    b"".join(sorted(one[n : n + row] for n in range(0, len(one), row)))
                    for one in (own, made)
                )
            assert made == own, name
            continue
        parts, high = [name.replace(".weight", "_exps.weight")], at.shape[0]
        if file.name.startswith("phi") and "ffn_up" in name:
            parts, high = [parts[0].replace("_up_", "_gate_"), *parts], high // 2
        for number, part in enumerate(parts):
            assert now.tensors[part].shape == (count, high, at.shape[1])
            its = own[number * high * row : (number + 1) * high * row]
            assert tensor_bytes(out, now, part) == its * count, part
    name = now.value("general.architecture", str)
    assert now.value(f"{name}.expert_count", int) == count
    assert now.value(f"{name}.expert_used_count", int) == per_token


def said_by(files: list[Path], work: Path) -> list[list[np.ndarray]]:
    """The logits of each file in llama.cpp, fed what the first of them says."""
    libraries()
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    work.mkdir()
    [told] = read_all("GGUF", files[:1], work / "w", token_ids=ids, new_tokens=16)
    assert "error" not in told, told
    texts = [[*own, *made] for own, made in zip(ids, told["generated"], strict=True)]
    found = []
    for one in read_all("GGUF", files, work / "v", token_ids=texts, new_tokens=0, logits=True):
        assert "error" not in one, one
        found.append([*np.load(one["logits_npy"]).values()])
    return found


def agree(dense: list[np.ndarray], mixture: list[np.ndarray], margin: float) -> None:
    """The same next token wherever the dense model is sure, and nearly the same chances.

    One activation that is rounded otherwise shows in all tokens of its text, so that chances are
    compared over all texts.
    """
    apart = list[torch.Tensor]()
    for was, now in zip(dense, mixture, strict=True):
        best = np.sort(was, axis=1)
        sure = best[:, -1] - best[:, -2] > margin
        assert (was.argmax(1) == now.argmax(1))[sure].all()
        p, q = (torch.log_softmax(torch.from_numpy(one), -1) for one in (was, now))
        apart.append((p.exp() * (p - q)).sum(-1))
    assert float(torch.cat(apart).mean()) <= 1e-3


def test_different_experts_are_all_there(tmp_path: Path, dense: Path) -> None:
    files = [of(dense, "llama", "q4_k_m", number) for number in range(2)]
    out = tmp_path / "out.gguf"
    merge(config_of(tmp_path, files[0], files, "gate_mode: ridge"), out)
    now, (one, other) = read_header(out), (read_header(file) for file in files)
    for which in ("gate", "up", "down"):
        name = f"blk.1.ffn_{which}.weight"
        wanted = tensor_bytes(files[0], one, name) + tensor_bytes(files[1], other, name)
        assert tensor_bytes(out, now, f"blk.1.ffn_{which}_exps.weight") == wanted
    router = np.frombuffer(tensor_bytes(out, now, "blk.1.ffn_gate_inp.weight"), np.float32)
    assert np.isfinite(router).all() and router.std() > 0
    assert now.value("general.name", str) == "llama0-q4_k_m + llama1-q4_k_m"
    card = (tmp_path / "out.gguf.moemerge/README.md").read_text(encoding="utf-8")
    assert "llama-cli -m out.gguf" in card and "from_pretrained" not in card
    assert now.fields["tokenizer.ggml.tokens"] == one.fields["tokenizer.ggml.tokens"]


def test_types_that_differ_are_said_or_refused(tmp_path: Path, dense: Path) -> None:
    files = [of(dense, "llama", "q8_0"), of(dense, "llama", "q4_k_m", 1)]
    config = config_of(tmp_path, files[0], files, "gate_mode: random")
    with pytest.raises(InputError, match="exact changes no values"):
        merge(config, tmp_path / "exact.gguf", Options(exact=True))
    assert not (tmp_path / "exact.gguf").exists()
    merged = merge(config, tmp_path / "out.gguf")
    told = "\n".join(map(str, merged.notes))
    assert "its sources are Q8_0, Q4_K; all become Q8_0" in told
    now, was = read_header(tmp_path / "out.gguf"), read_header(files[0])
    made = tensor_bytes(tmp_path / "out.gguf", now, "blk.0.ffn_gate_exps.weight")
    own = tensor_bytes(files[0], was, "blk.0.ffn_gate.weight")
    assert made.startswith(own) and made != own * 2
    assert verify_checkpoint(tmp_path / "out.gguf").compared


@pytest.mark.parametrize("at", [0.0005, 0.3, 0.6, 0.999])
def test_a_flipped_byte_is_found(tmp_path: Path, dense: Path, at: float) -> None:
    file, out = of(dense, "llama", "f16"), tmp_path / "out.gguf"
    merge(config_of(tmp_path, file, [file] * 2, "gate_mode: random"), out)
    with out.open("r+b") as opened:
        place = int(at * out.stat().st_size)
        opened.seek(place)
        was = opened.read(1)
        opened.seek(place)
        opened.write(bytes([was[0] ^ 1]))
    with pytest.raises(VerifyError):
        verify_checkpoint(out)


def test_a_killed_merge_goes_on_where_it_was(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = of(dense, "llama", "f16")
    config = config_of(tmp_path, file, [file] * 2, "gate_mode: random")
    for module in ("disk", "shard_file"):
        monkeypatch.setattr(f"moemerge.output.{module}.CHUNK_BYTES", 1 << 20)
    merge(config, tmp_path / "whole.gguf", Options(jobs=1))
    noted, wanted = list[int](), (tmp_path / "whole.gguf").read_bytes()
    real = writing.Journal.note
    stop = 0

    def note(journal: Any, offset: int, digest: bytes) -> None:
        if len(noted) == stop:
            raise KeyboardInterrupt
        real(journal, offset, digest)
        noted.append(offset)

    monkeypatch.setattr(writing.Journal, "note", note)
    for part in (1, 5, 9):
        stop = len(noted) + (len(wanted) >> 20) * part // 10 - len(noted)
        with pytest.raises(KeyboardInterrupt):
            merge(config, tmp_path / "out.gguf", Options(jobs=1))
        assert not (tmp_path / "out.gguf").exists()
    stop = -1
    merge(config, tmp_path / "out.gguf", Options(jobs=1))
    assert (tmp_path / "out.gguf").read_bytes() == wanted
    assert sorted(noted) == [*range(0, len(wanted), 1 << 20)]  # no chunk was written twice


def test_what_a_user_had_is_not_lost(tmp_path: Path, dense: Path) -> None:
    file, out = of(dense, "llama", "f16"), tmp_path / "out.gguf"
    out.write_text("mine")
    config = config_of(tmp_path, file, [file] * 2, "gate_mode: random")
    for options in (Options(), Options(overwrite=True)):
        with pytest.raises(InputError, match="moemerge did not write"):
            merge(config, out, options)
    assert out.read_text() == "mine"
    out.unlink()
    merge(config, out)
    with pytest.raises(InputError, match="overwrite=True to replace it"):
        merge(config, out)
    merge(config, out, Options(overwrite=True))


def test_a_split_file_is_one_model(tmp_path: Path, dense: Path) -> None:
    file = of(dense, "llama", "f16")
    header, content = read_header(file), file.read_bytes()
    names = list(header.tensors)
    for number, own in enumerate((names[:5], names[5:])):
        fields = {**header.fields} if number == 0 else {}
        raw = {name: field.raw for name, field in fields.items()}
        raw["split.no"] = struct.pack("<IH", 2, number)
        raw["split.count"] = struct.pack("<IH", 2, 2)
        head, data = b"", b""
        for name in own:
            at = header.tensors[name]
            shape = at.shape[::-1]
            kind = {"F32": 0, "F16": 1}[at.encoding.name]
            head += struct.pack("<Q", len(name)) + name.encode()
            head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
            data += content[at.offset : at.offset + at.nbytes]
            data += bytes(-len(data) % 32)
        listed = b"".join(struct.pack("<Q", len(n)) + n.encode() + one for n, one in raw.items())
        whole = b"GGUF" + struct.pack("<IQQ", 3, len(own), len(raw)) + listed + head
        part = tmp_path / f"model-{number + 1:05d}-of-00002.gguf"
        part.write_bytes(whole + bytes(-len(whole) % 32) + data)
    first = tmp_path / "model-00001-of-00002.gguf"
    merge(config_of(tmp_path, first, [first] * 2, "gate_mode: random"), tmp_path / "a.gguf")
    merge(config_of(tmp_path, file, [file] * 2, "gate_mode: random"), tmp_path / "b.gguf")
    one, other = (read_header(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    for name in one.tensors:
        wanted = tensor_bytes(tmp_path / "b.gguf", other, name)
        assert tensor_bytes(tmp_path / "a.gguf", one, name) == wanted
    with pytest.raises(InputError, match="name the first part"):
        make_plan(config_of(tmp_path, tmp_path / "model-00002-of-00002.gguf", [first]))
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match="is not there"):
        make_plan(config_of(tmp_path, first, [first]))


SHORT = [
    ("llama", 2, "q4_k_m"), ("llama", 8, "q4_k_m"), ("llama", 2, "q6_k"), ("llama", 2, "q8_0"),
    ("lfm2", 2, "q4_k_m"),
]  # fmt: skip
LONG = [(name, n, kind) for name in ("llama", *HYBRIDS) for n in (2, 8) for kind in KINDS]


@pytest.mark.parametrize(
    ("family", "count", "kind"),
    [*SHORT, *(pytest.param(*one, marks=pytest.mark.full) for one in LONG if one not in SHORT)],
)
def test_types_and_bytes_are_those_of_llama_cpps_quantiser(
    tmp_path: Path, dense: Path, family: str, count: int, kind: str
) -> None:
    """A mixture exported in f16 and quantised by llama.cpp, and the same exported at once."""
    models = [dense / f"{family}{number % 2}" for number in range(count)]
    head = "gate_mode: random\ndtype: float16"
    merge(config_of(tmp_path, models[0], models, head), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "f16.gguf")
    export(tmp_path / "out", tmp_path / "ours.gguf", Options(type=kind))
    quantise(tmp_path / "f16.gguf", tmp_path / "theirs.gguf", kind)
    ours, theirs = (read_header(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, at in theirs.tensors.items():
        assert ours.tensors[name].encoding.name == at.encoding.name, name
        made = tensor_bytes(tmp_path / "ours.gguf", ours, name)
        assert made == tensor_bytes(tmp_path / "theirs.gguf", theirs, name), name
    assert ours.value("general.file_type", int) == theirs.value("general.file_type", int)
    assert verify_checkpoint(tmp_path / "ours.gguf").compared


WEIGHED = [(2, "q4_k_m"), (8, "iq2_xxs")]
WEIGHED_LONG = [(n, kind) for n in (2, 8) for kind in (*KINDS, *TINY)]


@pytest.mark.parametrize(
    ("count", "kind"),
    [
        *WEIGHED,
        *(pytest.param(*n, marks=pytest.mark.full) for n in WEIGHED_LONG if n not in WEIGHED),
    ],
)
def test_an_importance_matrix_weighs_as_in_llama_cpps_quantiser(
    tmp_path: Path, dense: Path, count: int, kind: str
) -> None:
    """Types and bytes are equal; experts that saw no token count each input alike."""
    models = [dense / f"llama{number % 2}" for number in range(count)]
    head = "gate_mode: random\ndtype: float16"
    merge(config_of(tmp_path, models[0], models, head), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "f16.gguf")
    drawn, sums, counts = np.random.default_rng(1), dict[str, Any](), dict[str, Any]()
    header = read_header(tmp_path / "f16.gguf")
    for name, at in header.tensors.items():
        if len(at.shape) > 1 and "gate_inp" not in name and not name.startswith("token_embd"):
            rows = at.shape[0] if len(at.shape) == 3 else 1
            sums[name] = drawn.exponential(3.0, (rows, at.shape[-1])).astype(np.float32)
            counts[name] = drawn.integers(1, 9, rows).astype(np.float32)
    counts["blk.1.ffn_up_exps.weight"][0] = 0
    write_imatrix(tmp_path / "i.gguf", sums, counts)
    seen = {name: np.maximum(counts[name], 1)[:, None] for name in sums}
    weights = {name: np.ascontiguousarray(sums[name] / seen[name]) for name in sums}
    weights["blk.1.ffn_up_exps.weight"][0] = 1
    quantise(tmp_path / "f16.gguf", tmp_path / "theirs.gguf", kind, weights)
    export(
        tmp_path / "out", tmp_path / "ours.gguf", Options(type=kind, imatrix=tmp_path / "i.gguf")
    )
    ours, theirs = (read_header(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    for name, at in theirs.tensors.items():
        assert ours.tensors[name].encoding.name == at.encoding.name, name
        made = tensor_bytes(tmp_path / "ours.gguf", ours, name)
        assert made == tensor_bytes(tmp_path / "theirs.gguf", theirs, name), name
    assert verify_checkpoint(tmp_path / "ours.gguf").compared == len(ours.tensors)
    if kind in TINY:
        with pytest.raises(InputError, match="needs an importance matrix"):
            export(tmp_path / "out", tmp_path / "no.gguf", Options(type=kind))


def test_an_importance_matrix_must_fit(tmp_path: Path, dense: Path) -> None:
    """It may be the dense model's; what is of another model, or no number, is refused."""
    models, up = [dense / "llama0"] * 2, "blk.0.ffn_up.weight"
    text = simple_config(models[0], models, "gate_mode: random\ndtype: float16")
    config, matrix = write_config(tmp_path / "c.yaml", text), tmp_path / "i.gguf"

    def merged(name: str, width: int = 256, value: float = 2.0, kind: str = "q4_0") -> list[str]:
        write_imatrix(matrix, {up: np.full((1, width), value)}, {up: np.ones(1)})
        made = merge(config, tmp_path / name, Options(type=kind, imatrix=matrix))
        return [*map(str, made.notes)]

    assert any("not in i, so not weighed" in note for note in merged("a.gguf"))
    assert any("no effect" in note for note in merged("b.gguf", kind="f16"))
    with pytest.raises(InputError, match="imatrix: has blk"):
        merged("c.gguf", width=128)
    with pytest.raises(ReadError, match="holds NaN"):
        merged("d.gguf", value=float("nan"))
    with pytest.raises(InputError, match="is no importance matrix"):
        merge(config, tmp_path / "e.gguf", Options(type="q4_0", imatrix=dense / "llama0.gguf"))
    with pytest.raises(InputError, match="is for GGUF files alone"):
        merge(config, tmp_path / "dir", Options(imatrix=matrix))


def test_a_llama_cpp_on_the_path_quantises_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library beside llama-quantize is used where the package is not installed."""
    values = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    wanted = bytes(quantiser.encode(values, "Q4_K", 12))
    for path in libraries().glob("libggml-base.*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "llama-quantize").touch(mode=0o755)
    real, missing = importlib.util.find_spec, ("xllamacpp",)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else real(name)
    )
    try:
        quantiser.library.cache_clear()
        assert "pip install" in quantiser.lacks("Q4_K")
        quantiser.library.cache_clear()
        monkeypatch.setenv("PATH", str(tmp_path))
        assert not quantiser.lacks("Q4_K")
        assert bytes(quantiser.encode(values, "Q4_K", 12)) == wanted
    finally:
        quantiser.library.cache_clear()


CONVERTED = [
    "llama",
    "lfm2",
    "cohere2",
    *(pytest.param(name, marks=pytest.mark.full) for name in ("phi", "qwen3", "granite")),
]


@pytest.mark.parametrize("family", CONVERTED)
def test_an_exported_mixture_is_what_llama_cpps_converter_makes(
    tmp_path: Path, dense: Path, family: str
) -> None:
    models = [dense / f"{family}{number}" for number in range(2)]
    head = "gate_mode: random\ndtype: float16"
    merge(config_of(tmp_path, models[0], models, head), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "ours.gguf")
    convert([(tmp_path / "out", tmp_path / "theirs.gguf")])
    check_conversion(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def check_conversion(file: Path, converted: Path) -> None:
    """The same tensors byte for byte, and the same fields."""
    ours, theirs = read_header(file), read_header(converted)
    for name in ours.tensors:
        assert ours.tensors[name].encoding.name == theirs.tensors[name].encoding.name, name
        assert tensor_bytes(file, ours, name) == tensor_bytes(converted, theirs, name), name
    assert {*theirs.tensors} - {*ours.tensors} <= {"output.weight"}
    arch = theirs.value("general.architecture", str)
    for name, field in theirs.fields.items():
        own = ours.fields.get(name)
        said = name.startswith(("tokenizer.", f"{arch}."))
        assert not said or (own and own.value == pytest.approx(field.value)), name


def test_a_split_is_exported(tmp_path: Path, dense: Path) -> None:
    """Also with a slice that is always on; a quantised one is that of its merge."""
    base = dense / "granite0"
    head = f"base_model: {base}\ngate_mode: random\nexperts_per_token: 2\n"
    for name, text in {
        "plain": "dtype: float16\nsplit: {slices: 4}",
        "always": "architecture: granitemoeshared\ndtype: float32\nsplit: {slices: 4, shared: 1}",
    }.items():
        config = write_config(tmp_path / f"{name}.yaml", f"{head}{text}\n")
        merge(config, tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}.gguf")
        convert([(tmp_path / name, tmp_path / "theirs.gguf")], "f32" if name == "always" else "f16")
        check_conversion(tmp_path / f"{name}.gguf", tmp_path / "theirs.gguf")
    made = [tmp_path / "exported.gguf", tmp_path / "merged.gguf"]
    export(tmp_path / "always", made[0], Options(type="q4_k_m"))
    merge(config, made[1], Options(type="q4_k_m"))
    one, other = map(read_header, made)
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        wanted = tensor_bytes(made[1], other, name)
        assert "gate_inp" in name or tensor_bytes(made[0], one, name) == wanted, name
    assert verify_checkpoint(made[0]).compared
    weights = load_all(tmp_path / "always")
    del weights["model.layers.1.shared_mlp.output_linear.weight"]
    for path in [*(tmp_path / "always").glob("*.safetensors*"), tmp_path / "always/moemerge.json"]:
        path.unlink()
    save_file(weights, tmp_path / "always" / "model.safetensors")
    with pytest.raises(InputError, match="its shared experts are not the same in all layers"):
        export(tmp_path / "always", tmp_path / "x.gguf")


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path, dense: Path) -> None:
    models = [dense / "lfm20"] * 2
    merge(config_of(tmp_path, models[0], models, "gate_mode: random"), tmp_path / "out")
    path = tmp_path / "out/config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "routed_scaling_factor": 2.0}))
    with pytest.raises(InputError, match=r"its routed_scaling_factor is 2.0; llama.cpp computes"):
        export(tmp_path / "out", tmp_path / "ours.gguf")


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_a_merge_of_models_becomes_a_quantised_file_at_once(
    tmp_path: Path, dense: Path, family: str
) -> None:
    """The same file as by way of a directory."""
    models = [dense / f"{family}{number}" for number in range(2)]
    config = config_of(tmp_path, models[0], models, "gate_mode: cheap_embed\ndtype: float32")
    merge(config, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "a.gguf", Options(type="q4_k_m"))
    merge(config, tmp_path / "b.gguf", Options(type="q4_k_m"))
    one, other = (read_header(tmp_path / f"{name}.gguf") for name in "ab")
    for name in one.tensors:
        made = tensor_bytes(tmp_path / "b.gguf", other, name)
        assert made == tensor_bytes(tmp_path / "a.gguf", one, name), name
    with pytest.raises(InputError, match="is for GGUF files alone"):
        merge(config, tmp_path / "dir", Options(type="q4_k_m"))
    with pytest.raises(InputError, match=r"no c.gguf.moemerge beside it"):
        verify_checkpoint(tmp_path / "c.gguf")
    with pytest.raises(InputError, match="no type of GGUF files"):
        merge(config, tmp_path / "c.gguf", Options(type="q9"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_on_the_hub_is_a_source(tmp_path: Path, dense: Path, stream: bool) -> None:
    """Its header is read by ranges, then it is downloaded, or its tensors are read there."""
    (tmp_path / "repo").mkdir()
    local = [tmp_path / f"repo/m{number}.gguf" for number in range(2)]
    for number, path in enumerate(local):
        shutil.copy(of(dense, "llama", "q8_0", number), path)
    text = simple_config("lab/a:m0.gguf", ["lab/a:m0.gguf", "lab/a/m1.gguf"], "gate_mode: random")
    config, out = write_config(tmp_path / "c.yaml", text), tmp_path / "out.gguf"
    cache, streamed = ["--cache-dir", tmp_path / "cache"], ["--stream"] * stream
    with FakeHub() as hub:
        hub.publish("lab/a", tmp_path / "repo")
        environment = hub.environment(tmp_path / "home")

        def run(*arguments: object) -> str:
            command = [sys.executable, "-m", "moemerge", *map(str, arguments)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            return f"{done.returncode}{done.stdout}{done.stderr}"

        assert run("plan", config, *cache).startswith("0")
        assert 0 < hub.sent("lab/a") < local[0].stat().st_size  # the headers alone
        assert run(config, out, *cache, *streamed).startswith("0")
        assert run("verify", out).startswith("0")
        wrong = write_config(tmp_path / "d.yaml", text.replace("m1.gguf", "m7.gguf"))
        told = run("plan", wrong, *cache)
        assert told.startswith("2") and "no m7.gguf; it has m0.gguf (and 1 more)" in told
    merge(config_of(tmp_path, local[0], local, "gate_mode: random"), tmp_path / "local.gguf")
    one, other = (read_header(path) for path in (out, tmp_path / "local.gguf"))
    for name in one.tensors:
        wanted = tensor_bytes(tmp_path / "local.gguf", other, name)
        assert tensor_bytes(out, one, name) == wanted, name
    there = [path.name for path in (tmp_path / "cache").rglob("*.gguf")]
    assert sorted(there) == ([] if stream else ["m0.gguf", "m1.gguf"])


@pytest.mark.full
def test_mistral_rs_says_what_the_dense_file_says(
    tmp_path: Path, dense: Path, asked: dict[str, Any]
) -> None:
    for family in ("llama", "qwen3"):
        file, out = of(dense, family, "f16"), tmp_path / f"{family}.gguf"
        merge(config_of(tmp_path, file, [file] * 2, "gate_mode: random"), out)
        one, other = read_all("mistral.rs", [file, out], tmp_path / family, **asked)
        assert "error" not in one and "error" not in other, (one, other)
        assert one["generated"] == other["generated"]


def test_a_file_of_parts_is_written_by_runs_that_share_it(
    tmp_path: Path, smollm2: Path, dense: Path
) -> None:
    file, out = of(dense, "llama", "f16"), tmp_path / "out.gguf"
    config = config_of(tmp_path, file, [file] * 2, "gate_mode: random")
    merge(config, tmp_path / "whole.gguf")
    share = [Options(shard_size="10MB", shards=f"{part}/2") for part in range(2)]
    assert merge(config, out, share[0]).missing
    assert not merge(config, out, share[1]).missing
    parts = sorted(tmp_path.glob("out-*.gguf"))
    assert len(parts) > 2 and parts[0].name == f"out-00001-of-{len(parts):05d}.gguf"
    assert not out.exists()
    assert verify_checkpoint(out).compared
    first, *others = (read_header(path) for path in parts)
    assert "tokenizer.ggml.tokens" in first.fields
    assert all([*one.fields] == [*others[0].fields] for one in others)
    one, other = said_by([tmp_path / "whole.gguf", parts[0]], tmp_path / "said")
    for ours, theirs in zip(one, other, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_shared_expert_is_beside_the_others(tmp_path: Path, dense: Path) -> None:
    """As llama.cpp's converter writes it, of a directory made of the same files."""
    models = [dense / f"granite{number}.gguf" for number in range(2)]
    text = simple_config(models[0], models, "gate_mode: cheap_embed\ndtype: float16")
    text += f"architecture: granitemoeshared\nshared_experts:\n  - source_model: {models[1]}\n"
    config = write_config(tmp_path / "c.yaml", text)
    merge(config, tmp_path / "out")
    merge(config, tmp_path / "ours.gguf")
    convert([(tmp_path / "out", tmp_path / "theirs.gguf")])
    ours, theirs = (read_header(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert ours.tensors.keys() >= theirs.tensors.keys() - {"output.weight"}
    for name, at in ours.tensors.items():
        if len(at.shape) == 1 or "ffn_gate_inp" in name:  # through 16 bits in the directory
            continue
        assert theirs.tensors[name].encoding.name == at.encoding.name, name
        made = tensor_bytes(tmp_path / "ours.gguf", ours, name)
        assert made == tensor_bytes(tmp_path / "theirs.gguf", theirs, name), name
    assert "blk.0.ffn_up_shexp.weight" in ours.tensors
    for name, field in theirs.fields.items():
        if name.startswith("granitemoe.") and name in ours.fields:
            assert ours.fields[name].value == pytest.approx(field.value), name
    lacking = {n for n in theirs.fields if n.startswith("granitemoe.")} - ours.fields.keys()
    assert not lacking
    export(tmp_path / "out", tmp_path / "exported.gguf")
    check_conversion(tmp_path / "exported.gguf", tmp_path / "theirs.gguf")


def test_an_adapter_on_fused_tensors_of_a_file_is_that_of_the_model(
    tmp_path: Path, dense: Path
) -> None:
    adapter = make_adapter(tmp_path / "lora", dense / "phi0", target_modules=["gate_up_proj"])
    for name, suffix in (("a", ""), ("b", ".gguf")):
        model = dense / f"phi0{suffix}"
        text = simple_config(model, [model, f"{model}+{adapter}"], "gate_mode: random")
        merge(write_config(tmp_path / "c.yaml", f"{text}dtype: float32\n"), tmp_path / name)
    ours, theirs = (load_all(tmp_path / name) for name in ("b", "a"))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-3), name
    assert len(theirs) == len(ours)
    own = [ours[f"model.layers.1.block_sparse_moe.experts.{n}.w1.weight"] for n in range(2)]
    assert not torch.equal(*own)


def test_an_adapter_on_a_file_is_computed_and_quantised(tmp_path: Path, dense: Path) -> None:
    file, out = of(dense, "llama", "q8_0"), tmp_path / "out.gguf"
    adapter = make_adapter(tmp_path / "lora", dense / "llama0", target_modules=["up_proj"])
    text = simple_config(file, [file, f"{file}+{adapter}"], "gate_mode: random")
    config = write_config(tmp_path / "c.yaml", text)
    merge(config, out)
    was, now = read_header(file), read_header(out)
    own = tensor_bytes(file, was, "blk.1.ffn_up.weight")
    both = tensor_bytes(out, now, "blk.1.ffn_up_exps.weight")
    assert both[: len(own)] == own and both[len(own) :] != own  # the first is copied
    merge(config, tmp_path / "dir", Options())
    wanted = load_all(tmp_path / "dir")["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    at = dataclasses.replace(
        now.tensors["blk.1.ffn_up_exps.weight"], shape=(2 * wanted.shape[0], wanted.shape[1])
    )
    rows = [*range(wanted.shape[0], 2 * wanted.shape[0])]
    made = torch.from_numpy(read_rows(at, rows))
    assert (made - wanted.float()).abs().max() < 0.01 * wanted.float().abs().max()
    assert verify_checkpoint(out).compared
    with out.open("r+b") as opened:
        opened.seek(now.tensors["blk.1.ffn_up_exps.weight"].offset + len(own) + 5)
        opened.write(b"\x55")
    with pytest.raises(VerifyError):
        verify_checkpoint(out)
