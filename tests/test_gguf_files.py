"""GGUF files that lie are refused in one message, whatever they claim."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from babies import simple_config, write_config
from gguf_files import field, tensor, text, whole
from tokenizers import Tokenizer

from moemerge import InputError, make_plan
from moemerge.checkpoint.gguf.header import Field, Header, read_header
from moemerge.checkpoint.gguf.tokenizer import files_of

HUGE = 1 << 60
ARCH = field("general.architecture", "llama")
LLAMA = [
    ARCH, field("llama.block_count", 1), field("llama.context_length", 64),
    field("llama.embedding_length", 4), field("llama.feed_forward_length", 8),
    field("llama.attention.head_count", 1),
]  # fmt: skip
MATRIX = field("general.type", "imatrix")
EMBEDDING = tensor("token_embd.weight", (4, 4))


def fields(arch: str) -> list[bytes]:
    """The fields of a small model of that architecture, without its heads."""
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": 4, "feed_forward_length": 8,
    }  # fmt: skip
    own = [field(f"{arch}.{key}", value) for key, value in numbers.items()]
    return [field("general.architecture", arch), *own]


PHI3 = fields("phi3")
LFM2, COHERE2 = (
    [*fields(arch), field(f"{arch}.attention.head_count", 1)] for arch in ("lfm2", "cohere2")
)


def heads(*numbers: int) -> bytes:
    """An array of whole numbers."""
    return struct.pack(f"<IQ{len(numbers)}i", 5, len(numbers), *numbers)


def without(name: str) -> list[bytes]:
    return [one for one in LLAMA if not one.startswith(text(name))]


FILES: dict[str, tuple[bytes, str]] = {
    # what it is or claims: (the file, the reason that is given)
    "empty": (b"", "truncated"),
    "another format": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "half a header": (whole(LLAMA, [EMBEDDING])[:130], "truncated"),
    "an old version": (whole(LLAMA, [EMBEDDING], version=1), "version is 1"),
    "a version of the future": (whole(LLAMA, [EMBEDDING], version=9), "version is 9"),
    "big-endian": (whole([], [], version=3 << 24), "big-endian"),
    "2^60 tensors": (whole(LLAMA, [EMBEDDING], counts=(HUGE, 6)), "more than the file can hold"),
    "2^60 fields": (whole(LLAMA, [EMBEDDING], counts=(1, HUGE)), "more than the file can hold"),
    "a few fields more": (whole(LLAMA, [], data=0, counts=(0, 7)), "without a name"),
    "a name of 2^60 bytes": (whole([struct.pack("<Q", HUGE)], []), "more than there can be"),
    "a name longer than the file": (whole([struct.pack("<Q", 60_000)], []), "than there can be"),
    "a name that is no text": (whole([text(b"\xff\xfe") + bytes(8)], []), "not UTF-8"),
    "a text past the end": (
        whole([ARCH, field("x", struct.pack("<Q", 1 << 40), 8)], []), "more than there can be"),
    "a text that is no text": (whole([ARCH, field("x", text(b"\xff"), 8)], []), "not UTF-8"),
    "a type that does not exist": (whole([field("x", bytes(8), 13)], []), "type 13"),
    "items of a type that does not exist": (
        whole([field("x", struct.pack("<IQ", 99, 1) + bytes(8), 9)], []), "type 99"),
    "nested arrays": (
        whole([field("x", struct.pack("<IQ", 9, 1) + bytes(20), 9)], []), "array of arrays"),
    "2^60 items": (
        whole([field("x", struct.pack("<IQ", 4, HUGE), 9)], []), "more than the file can hold"),
    "2^60 texts": (
        whole([field("x", struct.pack("<IQ", 8, HUGE), 9)], []), "more than the file can hold"),
    "a text of an array past the end": (
        whole([field("x", struct.pack("<IQQ", 8, 1, 1 << 50), 9)], []), "more than there can be"),
    "neither true nor false": (whole([field("x", b"\x02", 7)], []), "neither true nor false"),
    "a field twice": (whole([ARCH, ARCH], []), "twice"),
    "an importance matrix": (whole([MATRIX], [tensor("x.in_sum2", (4, 1)),
        tensor("x.counts", (1, 1), offset=32)]), "is an importance matrix"),
    "sums without counts": (whole([MATRIX], [tensor("x.in_sum2", (4, 1))]), "has no pair"),
    "importances of another type": (whole([MATRIX], [tensor("x.in_sum2", (4, 1), 1),
        tensor("x.counts", (1, 1), offset=32)]), "which cannot be"),
    "more counts than sums": (whole([MATRIX], [tensor("x.in_sum2", (4, 1)),
        tensor("x.counts", (1, 3), offset=32)]), "which cannot be"),
    "a tensor twice": (whole(LLAMA, [EMBEDDING, EMBEDDING]), "twice"),
    "a long name of a tensor": (whole(LLAMA, [tensor("x" * 65)]), "more than there can be"),
    "no dimension": (whole(LLAMA, [tensor("x", (), count=0)]), "0 dimensions"),
    "five dimensions": (whole(LLAMA, [tensor("x", (1,) * 5)]), "5 dimensions"),
    "2^32 dimensions": (whole(LLAMA, [tensor("x", (4,), count=2**32 - 1)]), "dimensions"),
    "a length of 0": (whole(LLAMA, [tensor("x", (0, 4))]), "cannot be"),
    "a length of 2^60": (whole(LLAMA, [tensor("x", (HUGE, 8))]), "cannot be"),
    "lengths that overflow": (whole(LLAMA, [tensor("x", (1 << 32, 1 << 32))]), "cannot be"),
    "a tensor of no known type": (whole(LLAMA, [tensor("x", (4,), 4)]), "type 4, which is not"),
    "a tensor of a type far away": (whole(LLAMA, [tensor("x", (4,), 1 << 31)]), "is not known"),
    "rows that cut a block": (whole(LLAMA, [tensor("x", (48,), 8)]), "no multiple of Q8_0"),
    "a tensor past the end": (whole(LLAMA, [tensor("x", (64,))]), "the file has"),
    "an offset past the end": (whole(LLAMA, [tensor("x", (4,), 0, 1 << 40)]), "the file has"),
    "an offset of 2^64 - 32": (whole(LLAMA, [tensor("x", (4,), 0, 2**64 - 32)]), "the file has"),
    "a misaligned offset": (whole(LLAMA, [tensor("x", (4,), 0, 8)]), "not aligned"),
    "tensors that overlap": (
        whole(LLAMA, [tensor("x", (16,)), tensor("y", (4,), 0, 32)]), "x and y overlap"),
    "an alignment of 0": (whole([field("general.alignment", 0)], []), "no power of two"),
    "an alignment of 3": (whole([field("general.alignment", 3)], []), "no power of two"),
    "an alignment that is a text": (
        whole([field("general.alignment", "x")], []), "another type"),
    "no tensors": (whole(LLAMA, []), "a vocabulary alone"),
    "no architecture": (whole([], [EMBEDDING]), "no general.architecture"),
    "an architecture that is a number": (
        whole([field("general.architecture", 7)], [EMBEDDING]), "another type"),
    "an unknown architecture": (
        whole([field("general.architecture", "rwkv7")], [EMBEDDING]), "it is a rwkv7"),
    "a mixture": (
        whole([*LLAMA, field("llama.expert_count", 8)], [EMBEDDING]), "a mixture of experts"),
    "no width": (
        whole(without("llama.embedding_length"), [EMBEDDING]), "llama.embedding_length is None"),
    "a width that is a text": (
        whole([*without("llama.embedding_length"), field("llama.embedding_length", "4")],
              [EMBEDDING]), "another type"),
    "2^31 layers": (
        whole([*without("llama.block_count"), field("llama.block_count", 1 << 31)],
              [EMBEDDING]), "block_count is"),
    "more layers than tensors": (
        whole([*without("llama.block_count"), field("llama.block_count", 1 << 20)],
              [EMBEDDING, tensor("blk.0.attn_norm.weight", (4,), 0, 64)], 128), "block_count is"),
    "no embeddings": (whole(LLAMA, [tensor("x")]), "no token_embd.weight"),
    "a tensor of another architecture": (
        whole(LLAMA, [EMBEDDING, tensor("blk.0.ssm_a", (4,), 0, 64)], 128), "blk.0.ssm_a"),
    "heads of two widths": (
        whole([*LLAMA, field("llama.attention.key_length", 4),
               field("llama.attention.value_length", 2)], [EMBEDDING]), "different widths"),
    "a norm of nothing": (
        whole([*LLAMA, field("llama.attention.layer_norm_rms_epsilon", float("nan"))],
              [EMBEDDING]), "layer_norm_rms_epsilon is nan"),
    "a rope scaling of no known kind": (
        whole([*LLAMA, field("llama.rope.scaling.type", "magic")], [EMBEDDING]), "rope scaling"),
    "a part of a split model": (
        whole([*LLAMA, field("split.count", 3)], [EMBEDDING]), "one part of 3"),
    "key heads of other layers": (
        whole([*LFM2, field("lfm2.attention.head_count_kv", heads(0, 1), 9)], [EMBEDDING]),
        "has 2 numbers for 1 layers"),
    "key heads that are negative": (
        whole([*LFM2, field("lfm2.attention.head_count_kv", heads(-1), 9)], [EMBEDDING]),
        "head_count_kv is -1"),
    "no layer with key heads": (
        whole([*LFM2, field("lfm2.attention.head_count_kv", heads(0), 9)], [EMBEDDING]),
        "differs between layers"),
    "a convolution of nothing": (
        whole([*LFM2, field("lfm2.attention.head_count_kv", 1)], [EMBEDDING]), "conv_L_cache"),
    "fused rows that are not cut": (
        whole([*PHI3, field("phi3.attention.head_count", 2),
               field("phi3.attention.head_count_kv", 1)],
              [EMBEDDING, tensor("blk.0.attn_qkv.weight", (4, 6), 0, 64)], 256),
        "not cut into 4 parts"),
    "a window of less than nothing": (
        whole([*PHI3, field("phi3.attention.head_count", 1),
               field("phi3.attention.sliding_window", struct.pack("<i", -3), 5)], [EMBEDDING]),
        "sliding_window is -3"),
    "no scale of logits": (whole(COHERE2, [EMBEDDING]), "logit_scale is None"),
    "a scale of logits that is no number": (
        whole([*COHERE2, field("cohere2.logit_scale", float("inf"))], [EMBEDDING]),
        "logit_scale is inf"),
    "a pattern of no layers": (
        whole([*COHERE2, field("cohere2.logit_scale", 1.0),
               field("cohere2.attention.sliding_window", 4),
               field("cohere2.attention.sliding_window_pattern", 0)], [EMBEDDING]),
        "layer_types"),
    "scores for other tokens": (
        whole([*LLAMA, field("tokenizer.ggml.tokens", struct.pack("<IQ", 8, 1) + text("a"), 9),
               field("tokenizer.ggml.model", "llama")], [EMBEDDING]), "1 tokens and 0 scores"),
}  # fmt: skip


@pytest.mark.parametrize("claim", FILES)
def test_a_file_that_lies_is_refused_in_one_message(tmp_path: Path, claim: str) -> None:
    content, reason = FILES[claim]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        make_plan(write_config(tmp_path / "c.yaml", simple_config(path, [path])))
    [problem] = {(one.what, one.fix) for one in refused.value.problems}
    assert reason in problem[0], problem


def test_a_pre_tokenizer_is_found_by_its_name() -> None:
    """An LFM2's is a Llama 3's, and both begin texts with a token if the file does not say."""
    said = {
        "model": "gpt2", "tokens": ["<s>", "a", "b", "ab"], "token_type": [3, 1, 1, 1],
        "merges": ["a b"], "bos_token_id": 0,
    }  # fmt: skip
    made = [
        files_of(Header({f"tokenizer.ggml.{k}": Field(v, b"") for k, v in own.items()}, {}))
        for own in ({**said, "pre": "lfm2"}, {**said, "pre": "llama-bpe"})
    ]
    assert made[0] == made[1]
    assert Tokenizer.from_buffer(made[0]["tokenizer.json"]).encode("ab").ids == [0, 3]


def test_the_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole(LLAMA, [EMBEDDING, tensor("x", (32, 2), 8, 64)], 64 + 68))
    header = read_header(path)
    assert header.value("llama.block_count", int) == 1
    at = header.tensors["x"]
    assert (at.shape, at.encoding.name, at.nbytes) == ((2, 32), "Q8_0", 68)
    assert at.offset == path.stat().st_size - 68
