"""The engine: the same bytes by any path and through any crash, and nobody in another's way."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moemerge import InputError, Options, ReadError, RunError, merge, verify_checkpoint
from moemerge.merging import shard_loop
from moemerge.output import disk
from moemerge.output.state import State, hold

ROOT = Path(__file__).resolve().parent.parent
SMALL = "16KB"  # shards of the baby mixture, so that there are several


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "moemerge", *map(str, args)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def config(tmp_path: Path, babies: dict[str, Path]) -> Path:
    """Copies, a cast, an adapter, noise: every kind of recipe."""
    base, first, second = babies.values()
    adapter = make_adapter(tmp_path / "adapter", base)
    text = simple_config(
        base, [first, f"{base}+{adapter}", second], "gate_mode: random", "noise_scale: 0.01"
    )
    return write_config(tmp_path / "c.yaml", text.replace("noise_scale: 0.01", "name: one", 1))


def test_any_number_of_jobs_direct_or_not_gives_the_same_bytes(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(config, tmp_path / "one", Options(jobs=1, shard_size=SMALL))
    expected = files(tmp_path / "one")
    merge(config, tmp_path / "eight", Options(jobs=8, shard_size=SMALL))
    merge(config, tmp_path / "plain", Options(direct=False, shard_size=SMALL))
    for name in ("eight", "plain"):
        assert files(tmp_path / name) == expected
    shm = Path("/dev/shm") / tmp_path.name  # a file system that takes no direct writes
    if shm.parent.is_dir():
        try:
            merge(config, shm, Options(shard_size=SMALL))
            assert files(shm) == expected
        finally:
            shutil.rmtree(shm, ignore_errors=True)
    for name in ("O_DIRECT", "posix_fallocate", "copy_file_range"):  # another system
        monkeypatch.delattr(os, name, raising=False)
    merge(config, tmp_path / "bare", Options(shard_size=SMALL))
    assert files(tmp_path / "bare") == expected


def test_chunks_cut_anywhere_give_the_same_tensors(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums are over chunks, so those differ; the tensors do not."""
    merge(config, tmp_path / "whole")
    monkeypatch.setattr("moemerge.plan.blocks.BLOCK_VALUES", 1 << 18)
    monkeypatch.setattr("moemerge.output.shard_file.CHUNK_BYTES", 4096)
    merge(config, tmp_path / "cut", Options(jobs=4))
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert {n: whole[n] for n in whole if n.endswith("s")} == {
        n: cut[n] for n in cut if n.endswith("s")
    }
    verify_checkpoint(tmp_path / "cut")


def test_without_checksums_the_kernel_copies_and_the_bytes_are_the_same(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(config, tmp_path / "checked", Options(shard_size=SMALL))
    copied: list[int] = []
    original = disk.OutputFile.copy_range

    def counted(self: Any, source: Path, start: int, nbytes: int, offset: int) -> bool:
        copied.append(nbytes)
        return original(self, source, start, nbytes, offset)

    monkeypatch.setattr(disk.OutputFile, "copy_range", counted)
    merge(config, tmp_path / "copied", Options(shard_size=SMALL, checksums=False))
    assert sum(copied) > 20_000
    monkeypatch.setattr(disk.OutputFile, "copy_range", lambda *args: False)
    merge(config, tmp_path / "refused", Options(shard_size=SMALL, checksums=False))
    expected = files(tmp_path / "checked")
    for name in ("copied", "refused"):
        found = files(tmp_path / name)
        assert {n: b for n, b in found.items() if n != "moemerge.json"} == {
            n: b for n, b in expected.items() if n != "moemerge.json"
        }
        manifest = json.loads(found["moemerge.json"])
        assert not any("xxh3" in e for n, e in manifest["files"].items() if n.endswith("tensors"))
        verify_checkpoint(tmp_path / name)


def kill_at(fraction: float, line: list[str], out: Path, whole_seconds: float) -> bool:
    """Start the command and kill it outright after a share of its time; whether it was alive."""
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=fraction * whole_seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def check_kills(config: Path, tmp_path: Path, points: int, seed: int) -> None:
    """Kill at random points; never a model meanwhile, and always the same bytes in the end."""
    import time

    line = [config, "--shard-size", SMALL, "--jobs", "2", "--quiet"]
    begun = time.monotonic()
    subprocess.run(command(*line, tmp_path / "whole"), check=True, env=ENVIRONMENT)
    seconds = time.monotonic() - begun
    expected, draw, killed = files(tmp_path / "whole"), random.Random(seed), 0
    for point in range(points):
        out = tmp_path / f"killed{point}"
        while kill_at(draw.uniform(0.3, 1.05), command(*line, out), out, seconds):
            killed += 1
            if (out / "config.json").exists():
                break  # it had just become a model
            if out.exists():
                with pytest.raises((OSError, ValueError)):
                    AutoModelForCausalLM.from_pretrained(out)
        done = subprocess.run(command(*line, out), env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0 or "holds a finished model" in done.stderr
        assert files(out) == expected, f"point {point}"
        shutil.rmtree(out)
    assert killed >= points // 3


def test_killed_and_run_again_it_ends_with_the_same_bytes(config: Path, tmp_path: Path) -> None:
    check_kills(config, tmp_path, points=4, seed=0)


@pytest.mark.full
def test_killed_at_fifty_points(config: Path, tmp_path: Path) -> None:
    check_kills(config, tmp_path, points=50, seed=1)


class Stop(BaseException):
    """Death, in the same process."""


def stop_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `write_shard` write so many shards and then die; returns the list of those written."""
    written: list[str] = []
    original = shard_loop.write_shard

    def mortal(shard: Any, *more: Any) -> Any:
        if len(written) == shards:
            raise Stop
        written.append(shard.file)
        return original(shard, *more)

    monkeypatch.setattr(shard_loop, "write_shard", mortal)
    return written


def test_killed_while_it_clears_up_it_is_a_finished_model(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "out", Path.unlink
    for survivors in range(4):
        seen: list[Path] = []

        def mortal(
            path: Path,
            missing_ok: bool = False,
            seen: list[Path] = seen,
            survivors: int = survivors,
        ) -> None:
            if (out / "config.json").exists() and path.parent.name == ".moemerge":
                seen.append(path)
                if len(seen) > survivors:
                    raise Stop
            original(path, missing_ok=missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", mortal)
            with pytest.raises(Stop):
                merge(config, out, Options(shard_size=SMALL, overwrite=survivors > 0))
        verify_checkpoint(out)
        with pytest.raises(InputError, match="holds a finished model"):
            merge(config, out, Options(shard_size=SMALL))


def test_the_next_run_goes_on_from_finished_shards_and_routers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", Options(shard_size=SMALL)
    plan = merge(config, tmp_path / "whole", options).plan
    with monkeypatch.context() as patched:
        first = stop_after(3, patched)
        with pytest.raises(Stop):
            merge(config, out, options)
    damaged = out / first[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with monkeypatch.context() as patched:
        second = stop_after(1000, patched)
        gate = "moemerge.gates.modes.random.routers"
        patched.setattr(gate, lambda task: pytest.fail("routers are made once"))
        merge(config, out, options)
    assert set(second) == {shard.file for shard in plan.shards} - set(first) | {first[1]}
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("change", ["config", "seed", "prompts", "source"])
def test_a_changed_config_or_source_is_refused_or_started_over(
    change: str, tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = shutil.copytree(babies["first"], tmp_path / "expert")
    text = simple_config(babies["base"], [babies["base"], expert], "gate_mode: cheap_embed")
    config, out = write_config(tmp_path / "c.yaml", text), tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(Stop):
            merge(config, out, Options(shard_size=SMALL))
    before = files(out)
    options = {"shard_size": SMALL, "seed": 5 if change == "seed" else 0}
    if change == "config":
        config.write_text(text + "dtype: bfloat16\n")
    if change == "prompts":
        config.write_text(text.replace("code python", "castle"))
    if change == "source":
        state = load_file(expert / "model.safetensors")
        save_weights(expert, {name: tensor + 1 for name, tensor in state.items()})
    words = f"that began before {expert} changed" if change == "source" else "of another config"
    with pytest.raises(InputError, match=f"unfinished merge {words}"):
        merge(config, out, Options(**options))
    assert files(out) == before
    merge(config, out, Options(**options, overwrite=True))
    merge(config, tmp_path / "fresh", Options(**options))
    assert files(out) == files(tmp_path / "fresh")


def test_a_second_run_is_refused_while_the_first_lives(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with State(out).mine(shared=False) as mine:
        assert mine
        for options in (Options(), Options(shards="0/2"), Options(overwrite=True)):
            with pytest.raises(InputError, match="another moemerge is writing there"):
                merge(config, out, options)
    with State(out).mine(shared=True), pytest.raises(InputError, match="another moemerge"):
        merge(config, out)
    merge(config, out)  # a lock that nobody holds is no trap
    verify_checkpoint(out)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from moemerge.output.state import hold\n"
        "with hold(Path(sys.argv[1]), wait=False) as held:\n print(held, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout and process.stdin
    assert process.stdout.readline() == "True\n"
    with hold(tmp_path / "lock", wait=False) as held:
        assert not held
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()
    with hold(tmp_path / "lock", wait=False) as held:
        assert held


def test_a_lock_whose_file_was_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had it removes the file, and the directory, just when another has opened it."""
    fcntl = pytest.importorskip("fcntl")
    real, path = fcntl.flock, tmp_path / "state" / "lock"

    def late(handle: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        path.parent.rmdir()
        real(handle, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(path, wait=False) as held, hold(path, wait=False) as second:
        assert held and not second
        assert path.exists()


def test_shares_written_one_after_another_complete_the_output(config: Path, tmp_path: Path) -> None:
    options = {"shard_size": SMALL}
    merge(config, tmp_path / "whole", Options(**options))
    out = tmp_path / "out"
    for part in (2, 0, 1):
        assert not (out / "config.json").exists()
        merged = merge(config, out, Options(**options, shards=f"{part}/3"))
    assert merged.missing == 0
    assert files(out) == files(tmp_path / "whole")
    again = merge(config, out, Options(**options, shards="0/3"))
    assert (again.written, again.missing) == (0, 0)


def test_shares_written_at_once_complete_the_output(config: Path, tmp_path: Path) -> None:
    """Two processes for each share: shards are claimed one by one, and one of them completes."""
    merge(config, tmp_path / "whole", Options(shard_size=SMALL))
    out = tmp_path / "out"
    line = [config, out, "--shard-size", SMALL, "--shards"]
    runs = [
        subprocess.Popen(
            command(*line, f"{part}/2"), env=ENVIRONMENT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for part in (0, 1, 0, 1)
    ]  # fmt: skip
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0, 0], "".join(err for _, err in said)
    assert files(out) == files(tmp_path / "whole")


def test_a_source_that_changes_meanwhile_is_named(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = shutil.copytree(babies["first"], tmp_path / "expert")
    text = simple_config(babies["base"], [babies["base"], expert], "gate_mode: random")
    config = write_config(tmp_path / "c.yaml", text)
    original = shard_loop.write_shard

    def meddle(shard: Any, *more: Any) -> Any:
        state = load_file(expert / "model.safetensors")
        save_weights(expert, {name: tensor + 1 for name, tensor in state.items()})
        return original(shard, *more)

    monkeypatch.setattr(shard_loop, "write_shard", meddle)
    with pytest.raises(ReadError, match=r"expert/model.safetensors: changed since the merge began"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_a_dtype_cannot_hold_are_named(tmp_path: Path, value: float) -> None:
    base = make_model(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_weights(base, state)
    text = simple_config(base, [base, base], "gate_mode: random\ndtype: float16")
    config = write_config(tmp_path / "c.yaml", text)
    with pytest.raises(ReadError, match=r"layers.1.mlp.up_proj.weight holds NaN or Inf"):
        merge(config, tmp_path / "out")
    assert not list((tmp_path / "out/.moemerge").glob("*.part"))


def broken(folder: Path, tensor: str, value: float, dtype: torch.dtype = torch.float32) -> Path:
    """A model with a row of a value that is not finite, or nearly so."""
    model = make_model(folder, seed=3, dtype=dtype)
    state = load_file(model / "model.safetensors")
    state[tensor][-1] = value
    save_weights(model, state)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_finite_is_named_while_it_is_copied(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    base = make_model(tmp_path / "base", dtype=dtype)
    expert = broken(tmp_path / "expert", "model.layers.1.mlp.down_proj.weight", value, dtype)
    text = simple_config(base, [base, expert], "gate_mode: random")
    with pytest.raises(ReadError) as refused:
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert f"{expert}: model.layers.1.mlp.down_proj.weight holds NaN or Inf" in str(refused.value)
    assert not (tmp_path / "out/config.json").exists()


def test_a_token_that_no_text_has_may_have_any_row(tmp_path: Path) -> None:
    base = broken(tmp_path / "base", "model.embed_tokens.weight", float("nan"))
    text = simple_config(base, [base, base])
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("mode", ["ridge", "self", "hidden"])
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_gates_name_the_expert_that_breaks_them(tmp_path: Path, mode: str, value: float) -> None:
    base = make_model(tmp_path / "base")
    expert = broken(tmp_path / "expert", "model.layers.0.mlp.down_proj.weight", value)
    text = simple_config(base, [base, expert], f"gate_mode: {mode}")
    config = write_config(tmp_path / "c.yaml", text)
    if mode == "hidden":  # of the base alone
        text = simple_config(expert, [base, base], f"gate_mode: {mode}")
        config = write_config(tmp_path / "c.yaml", text)
    with pytest.raises(RunError) as refused:
        merge(config, tmp_path / "out")
    assert str(expert) in str(refused.value) and f"{base}:" not in str(refused.value)


def test_a_disk_that_fills_up_keeps_what_was_finished(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(config, tmp_path / "whole", Options(shard_size=SMALL))
    full = iter([False, False, False, True])
    original = disk.OutputFile.__init__

    def filling(self: Any, path: Path, nbytes: int, *how: bool, **more: bool) -> None:
        if nbytes > 4096 and next(full, False):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(self, path, nbytes, *how, **more)

    monkeypatch.setattr(disk.OutputFile, "__init__", filling)
    with pytest.raises(RunError, match=r"9 shards are still to come; free \d.* run the same"):
        merge(config, tmp_path / "out", Options(shard_size=SMALL))
    there = set(files(tmp_path / "out"))
    assert len(there) >= 2
    merge(config, tmp_path / "out", Options(shard_size=SMALL))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_torch_keeps_the_threads_it_had(config: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merge(config, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_the_same_models_elsewhere_and_newer_give_the_same_files(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    """Where sources lie and when they were copied is in the manifest alone."""
    found = []
    for name in ("here", "there"):
        folder = tmp_path / name
        for model in ("base", "first"):
            shutil.copytree(babies[model], folder / model)
        os.utime(folder / "first/model.safetensors", (1e9, 1e9 + len(name)))
        text = simple_config("./base", ["./base", "./first"], per_expert="noise_scale: 0.1")
        merge(write_config(folder / "c.yaml", text), folder / "out")
        found.append({n: b for n, b in files(folder / "out").items() if n != "moemerge.json"})
    assert found[0] == found[1]


def test_peak_memory_is_what_the_plan_says(tmp_path: Path, babies: dict[str, Path]) -> None:
    """Of whole processes, with and without torch: no more than planned, and no less than half."""
    base, first, _ = babies.values()
    adapter = make_adapter(tmp_path / "adapter", base)
    for expert in (first, f"{base}+{adapter}"):
        config = write_config(
            tmp_path / "c.yaml", simple_config(base, [base, expert], "gate_mode: random")
        )
        planned = subprocess.run(
            command("plan", config, "--json"), capture_output=True, check=True, env=ENVIRONMENT
        )
        said = subprocess.run(
            command(config, tmp_path / "out", "--overwrite"),
            capture_output=True, check=True, text=True, env=ENVIRONMENT,
        ).stdout  # fmt: skip
        number, unit = said.split("peak memory ")[1].split()[:2]
        peak = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
        expected = json.loads(planned.stdout)["expected_peak_bytes"]
        assert expected / 2 < peak < expected * 1.1
