"""What is not what it was: sources changed in place, and what each command then says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config, write_config
from safetensors.torch import load_file, save_file
from test_engine import Stop, stop_after

from moemerge import (
    EvalSpec,
    InputError,
    Options,
    VerifyError,
    add,
    drop,
    evaluate,
    merge,
    regate,
    routing_report,
    top_k,
    verify_checkpoint,
)
from moemerge.checkpoint import fingerprint
from moemerge.checkpoint.open import open_checkpoint
from moemerge.checkpoint.reference import Reference
from moemerge.output.manifest import read_manifest
from moemerge.plan.plan import Plan, digest_of
from moemerge.reporting import Silent


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def opened(directory: Path) -> Any:
    return open_checkpoint(Reference(str(directory), directory))


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other values under the same names, shapes and dtypes, in a file of the same size."""
    state = load_file(directory / "model.safetensors")
    change(state)
    save_weights(directory, state)


def nudge(name: str) -> Callable[[Path], None]:
    return lambda d: rewritten(d, lambda state: state[name].flatten()[5:6].add_(1))


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        data = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**data, **changes}, indent=1))

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "trained": lambda d: rewritten(d, lambda s: [tensor.mul_(1.01) for tensor in s.values()]),
    "one value of a matrix": nudge("model.layers.1.mlp.down_proj.weight"),
    "one value of a norm": nudge("model.norm.weight"),
    "one value of the embeddings": nudge("model.embed_tokens.weight"),
    "a number of its config.json": edit("config.json", rms_norm_eps=1e-3),
}
THE_SAME: dict[str, Callable[[Path], object]] = {
    "touched": lambda d: os.utime(d / "model.safetensors", (1e9, 1e9)),
    "who saved it": edit("config.json", transformers_version="9", _name_or_path="lab/it"),
    "its card": lambda d: (d / "README.md").write_text("mine"),
    "its chat template": lambda d: (d / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("how", [*CHANGES, *THE_SAME])
def test_a_fingerprint_is_of_the_content(tmp_path: Path, babies: dict[str, Path], how: str) -> None:
    model = shutil.copytree(babies["first"], tmp_path / "copied")
    before = opened(babies["first"])
    assert opened(model).fingerprint == before.fingerprint
    (CHANGES | THE_SAME)[how](model)
    assert (opened(model).fingerprint != before.fingerprint) == (how in CHANGES)
    assert opened(model).headers == before.headers  # by sizes and headers all are the same


@pytest.mark.parametrize("form", [{"bins": True}, {"shards": 3}, {"bins": True, "shards": 2}])
def test_in_every_format(tmp_path: Path, form: dict[str, Any]) -> None:
    one, other = (make_model(tmp_path / str(n), seed=n, **form) for n in range(2))
    assert opened(one).headers == opened(other).headers
    assert opened(one).fingerprint != opened(other).fingerprint
    assert opened(make_model(tmp_path / "2", seed=1, **form)).fingerprint == (
        opened(other).fingerprint
    )


def test_an_adapter_is_known_by_all_its_bytes(tmp_path: Path, babies: dict[str, Path]) -> None:
    adapter = make_adapter(tmp_path / "adapter", babies["base"])
    path, before = adapter / "adapter_model.safetensors", opened(adapter).fingerprint
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), (len(content) - start) // 20):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert opened(adapter).fingerprint != before, at
    path.write_bytes(content)
    assert opened(adapter).fingerprint == before


@pytest.mark.parametrize("count", [10, 5000])
def test_little_is_read_of_a_large_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Some of every tensor, and no more in all than a few megabytes, or a block of each."""
    path = large(tmp_path, count)
    read: dict[int, int] = {}
    original = fingerprint._read

    def counting(file: Any, start: int, nbytes: int, digest: Any) -> None:
        read[start] = nbytes
        original(file, start, nbytes, digest)

    monkeypatch.setattr(fingerprint, "_read", counting)
    before = opened(tmp_path).fingerprint
    places, each = sorted(read), (1 << 20)
    data = path.stat().st_size - count * each
    assert {(at - data) // each for at in places} == set(range(count))
    assert sum(read.values()) <= max(count, 1 << 11) * 4096
    with path.open("r+b") as file:  # one byte that is read, of the last tensor
        file.seek(places[-1] + 7)
        file.write(b"x")
    assert opened(tmp_path).fingerprint != before


def large(directory: Path, count: int) -> Path:
    """A model of many tensors, each a megabyte, that takes no room on the disk."""
    header: dict[str, Any] = {}
    for number in range(count):
        span = [number << 20, (number + 1) << 20]
        header[f"model.layers.{number}.x"] = {
            "dtype": "F32", "shape": [512, 512], "data_offsets": span
        }  # fmt: skip
    text = json.dumps(header).encode()
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (count << 20))
    (directory / "config.json").write_text('{"model_type": "other"}')
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, a config that merges them, and the mixture."""
    root = tmp_path_factory.mktemp("kept")
    models = [make_model(root / name, seed=n) for n, name in enumerate(("base", "altered"))]
    text = simple_config(models[0], [*models], "gate_mode: hidden")
    merge(write_config(root / "c.yaml", text), root / "out", Options(shard_size="16KB"))
    (root / "t.txt").write_text("code python function\nstory scene dragon\n" * 3)
    return root


@pytest.fixture
def root(kept: Path, tmp_path: Path) -> Path:
    """The same in a place of its own; that a copy has other times changes nothing."""
    made = shutil.copytree(kept, tmp_path / "root")
    for path in (made / "c.yaml", made / "out" / "moemerge.json"):
        path.write_text(path.read_text().replace(str(kept), str(made)))
    rehashed(made / "out")
    return made


def rehashed(out: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> None:
    """Change a manifest as an earlier version would have written it."""
    path = out / "moemerge.json"
    data = json.loads(path.read_text())
    change(data)
    said = {**data["plan"], "sources": data["sources"]}
    data["plan_digest"] = digest_of(Plan.without_places(said))
    path.write_text(json.dumps(data))


def swap_tokens(directory: Path) -> None:
    data = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["code"], vocabulary["story"] = vocabulary["story"], vocabulary["code"]
    (directory / "tokenizer.json").write_text(json.dumps(data))


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


def test_the_same_source_is_compared(root: Path) -> None:
    heard = Heard()
    found = verify_checkpoint(root / "out", heard)
    assert found.compared == found.tensors - 2  # which are routers
    assert not any("changed" in line for line in heard.lines)
    regate(root / "out", root / "c.yaml")
    assert verify_checkpoint(root / "out").compared == found.compared


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_source_is_named_and_the_output_is_not_blamed(root: Path, how: str) -> None:
    CHANGES[how](root / "altered")
    heard = Heard()
    found = verify_checkpoint(root / "out", heard)
    assert 0 < found.compared < found.tensors - 2
    line = f"{root / 'altered'}: it changed since the merge, so it is not compared"
    assert any(said.startswith(line) for said in heard.lines), heard.lines


def add_it(root: Path) -> object:
    return add(str(root / "out"), str(root / "altered"), root / "more")


COMMANDS: dict[str, Callable[[Path], object]] = {
    "regate": lambda root: regate(root / "out", root / "c.yaml"),
    "add": add_it,
    "routing": lambda root: routing_report(root / "out", {}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_goes_on_with_what_is_another_source_by_now(root: Path, command: str) -> None:
    CHANGES["trained"](root / "altered")
    words = [f"{root / 'altered'}: it changed since {root / 'out'} was made of it"]
    if command != "add":  # which uses no expert's tokens
        swap_tokens(root / "base")
        words.append(f"{root / 'base'}: its tokenizer changed since {root / 'out'} was made of it")
    before = files(root / "out")
    with pytest.raises(InputError) as refused:
        COMMANDS[command](root)
    assert all(any(word in str(one) for one in refused.value.problems) for word in words)
    assert files(root / "out") == before and not (root / "more").exists()


def test_a_mixture_is_not_judged_beside_what_it_was_not_made_of(root: Path) -> None:
    CHANGES["trained"](root / "altered")
    heard = Heard()
    found = evaluate(root / "out", EvalSpec({"t": root / "t.txt"}), reporter=heard)
    assert found["columns"] == ["mixture"]
    assert any(f"{root / 'altered'}: it changed since" in line for line in heard.lines)


def test_a_merge_that_began_with_another_source_does_not_go_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = root / "new", Options(shard_size="16KB")
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(Stop):
            merge(root / "c.yaml", out, options)
    before = files(out)
    CHANGES["one value of a norm"](root / "altered")
    with pytest.raises(InputError, match=f"that began before {root / 'altered'} changed; pass"):
        merge(root / "c.yaml", out, options)
    assert files(out) == before


def test_a_change_that_no_sample_saw_is_found_by_its_bytes(tmp_path: Path) -> None:
    """By the file's time it is the source that changed; else it may be the output."""
    base, other = (make_model(tmp_path / n, vocab_size=8000) for n in ("base", "other"))
    text = simple_config(base, [other, other], "gate_mode: random")
    config = write_config(tmp_path / "c.yaml", text)
    out = tmp_path / "out"
    merge(config, out)
    stat, before = (base / "model.safetensors").stat(), opened(base).fingerprint
    rewritten(base, lambda state: state["model.embed_tokens.weight"][4321].add_(1))
    assert opened(base).fingerprint == before
    heard = Heard()
    found = verify_checkpoint(out, heard)
    assert found.compared == found.tensors - 3
    [line] = [said for said in heard.lines if said.startswith(f"{base}: it changed")]
    assert "model.embed_tokens.weight is different now; the output matches" in line
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(VerifyError, match=r"embed_tokens\.weight is not what its sources give"):
        verify_checkpoint(out)


def test_a_manifest_of_an_earlier_version_is_compared_by_its_own_rule(root: Path) -> None:
    """Its fingerprints were of sizes and headers."""

    def as_it_was(data: dict[str, Any]) -> None:
        for source in data["sources"]:
            source["fingerprint"] = opened(Path(source["directory"])).headers
            source.pop("tokens", None)

    rehashed(root / "out", as_it_was)
    heard = Heard()
    found = verify_checkpoint(root / "out", heard)
    assert found.compared == found.tensors - 2, heard.lines
    regate(root / "out", root / "c.yaml")
    old = [one.fingerprint for one in read_manifest(root / "out").plan.sources]
    assert old == [opened(root / name).headers for name in ("base", "altered")]
    assert verify_checkpoint(root / "out").compared == found.compared
    make_model(root / "altered", seed=1, shards=2)
    (root / "altered" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{root / 'altered'}: it changed"):
        regate(root / "out", root / "c.yaml")


def test_a_mixture_that_was_saved_over_is_not_what_its_manifest_tells(root: Path) -> None:
    """What is made of it is not said to be of the models that it was made of."""
    shard = next((root / "out").glob("model-00002-*"))
    state = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    save_file(state, shard, metadata={"format": "pt"})
    heard = Heard()
    top_k(str(root / "out"), 1, root / "one", reporter=heard)
    assert any(f"{shard.name} is not the file that it tells of" in s for s in heard.lines)
    verify_checkpoint(root / "one")
    drop(str(root / "out"), "0", root / "less")
    verify_checkpoint(root / "less")


# the manifest


def places(data: Any, at: tuple[Any, ...] = ()) -> Any:
    """The place of everything in a manifest; of long lists the first and the last."""
    if at:
        yield at
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*at, key))
    elif isinstance(data, list):
        for number in sorted({0, len(data) - 1}) if data else ():
            yield from places(data[number], (*at, number))


GONE = object()
OTHERS = (GONE, None, [], {}, "x", -1, 1.5, True, [None], {"x": None})


def test_a_damaged_manifest_is_named(root: Path) -> None:
    """Whatever is lost or mistyped: one message that names the file, or the rest is enough."""
    path = root / "out" / "moemerge.json"
    whole = json.loads(path.read_text())
    listed = [at for at in places(whole) if at[:2] != ("plan", "shards") or len(at) < 6]
    assert len(listed) > 100
    told = 0
    for number, at in enumerate(listed):
        for other in OTHERS[number % 3 :: 3] if len(at) > 2 else OTHERS:
            data = json.loads(json.dumps(whole))
            parent = data
            for key in at[:-1]:
                parent = parent[key]
            if other is GONE:
                del parent[at[-1]]
            elif type(parent[at[-1]]) is type(other):
                continue
            else:
                parent[at[-1]] = other
            path.write_text(json.dumps(data))
            try:
                manifest = read_manifest(root / "out")
            except ValueError as error:
                told += bool(str(error))
            else:
                assert manifest.plan.nbytes and manifest.files, at
                with suppress(VerifyError):
                    verify_checkpoint(root / "out")
                assert at[0] in (
                    "seed", "folder", "routing", "card", "sources", "files", "tuned"
                ), (at, other)  # fmt: skip
    assert told > 300


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an entry without its checksum": (
        lambda d: d["files"].update({"tokenizer.json": {"bytes": 1}}), "entry of tokenizer.json"
    ),
    "an entry that is none": (lambda d: d["files"].update({"config.json": 7}), "entry of config"),
    "no entry of a shard": (
        lambda d: d["files"].pop(d["plan"]["shards"][0]["file"]), "no entry of model-00001"
    ),
    "no plan": (lambda d: d.pop("plan"), "lacks 'plan'"),
    "a plan of text": (lambda d: d.update(plan="x"), "damaged"),
    "another seed": (lambda d: d["plan"].update(seed=4), "its plan does not match"),
    "a folder of numbers": (lambda d: d.update(folder=3), "its folder is 3"),
    "a time of text": (lambda d: d["sources"][0].update(modified="x"), "its modified of"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_names_a_damaged_manifest(root: Path, what: str) -> None:
    path = root / "out" / "moemerge.json"
    data = json.loads(path.read_text())
    DAMAGE[what][0](data)
    path.write_text(json.dumps(data))
    with pytest.raises(VerifyError, match=r"moemerge\.json: it") as refused:
        verify_checkpoint(root / "out")
    assert DAMAGE[what][1] in str(refused.value)
    with pytest.raises(VerifyError, match=r"moemerge\.json: it"):
        regate(root / "out", root / "c.yaml")


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, "\xff"])
def test_verify_names_a_manifest_that_is_none(root: Path, content: str) -> None:
    (root / "out" / "moemerge.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(VerifyError, match=r"moemerge\.json"):
        verify_checkpoint(root / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_verify_names_a_file_that_is_gone(root: Path, name: str) -> None:
    (root / "out" / name).unlink()
    with pytest.raises(VerifyError, match=f"{name}: is gone"):
        verify_checkpoint(root / "out")
