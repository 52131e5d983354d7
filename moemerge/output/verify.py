"""A finished output verified: every byte against the manifest and against the sources."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from moemerge.checkpoint import (
    ENCODINGS,
    QUANTISED,
    Location,
    numpy_dtype,
    read_values,
)
from moemerge.errors import Line, VerifyError
from moemerge.files import CONFIG_FILE, folder_of, place_of
from moemerge.output.directory import MODEL_SUFFIXES
from moemerge.output.disk import CHUNK_BYTES, buffer
from moemerge.output.estimate import seconds_to_compare
from moemerge.output.finished import available_sources, check_shards, open_manifest
from moemerge.output.manifest import FileEntry, Manifest
from moemerge.output.shard_file import (
    ShardFile,
    checksum,
    chunk_digest,
    chunks,
    file_checksum,
    fill_tensor,
    read_chunk,
    same_bytes,
    threads,
)
from moemerge.plan import (
    INDEX_FILE,
    ROUTERS,
    Plan,
    PlannedTensor,
    Shard,
    Sources,
    recipe,
    weight_index,
)
from moemerge.reporting import Reporter, listener, size

SAMPLED_TENSORS = 16
_SAMPLE_BYTES = 1 << 20
_JOBS = 4
_ULP = {"F32": 2.0**-22, "F16": 2.0**-10, "BF16": 2.0**-7}
_SUM, _FEW = 2.0**-20, 0.01
"""Bounds of a difference in rounding: one unit in the last place, the error of a float32 sum, and
the share of values that differ."""


@dataclass(frozen=True)
class Verified:
    """The result of a check: `bytes_read` of the output, and how many of its `tensors` were
    `compared` with their sources, in `seconds`."""

    bytes_read: int
    compared: int
    tensors: int
    seconds: float


def verify_shards(
    plan: Plan, out: Path, sources: Sources, only: Collection[Shard] | None = None
) -> None:
    """The quick check at the end of a merge: headers, sizes, routers, first bytes of some tensors.

    With `only`, just these shards are checked. Tensors that would be read from the Hub again are
    not compared.

    Raises:
        VerifyError: a file in `out` does not match the plan.
    """
    shards = plan.shards if only is None else only
    for shard in shards:
        _check_header(shard, out)
    if plan.shards[0] in shards:
        _check_routers(plan, out)
    places = [
        (place_of(out, shard.file), tensor, offset)
        for shard in shards
        for tensor, offset in zip(shard.tensors, shard.starts(), strict=True)
        if not _of_a_gate(tensor)
        if not any(sources[read.source][read.tensor].remote for read in recipe.reads(tensor.recipe))
    ]
    chosen = random.Random(plan.digest).sample(places, min(SAMPLED_TENSORS, len(places)))
    for path, tensor, offset in chosen:
        made = memoryview(bytearray(min(tensor.nbytes, _SAMPLE_BYTES)))
        fill_tensor(made, 0, tensor, sources)
        if not _is_made(read_chunk(path, offset, len(made)), made, tensor):
            raise _differs(path, tensor)


def with_heads(plan: Plan, out: Path) -> Plan:
    """The plan of finished GGUF files, with their first bytes, which are in the files alone."""
    if not plan.is_gguf:
        return plan
    shards = []
    for shard in plan.shards:
        with place_of(out, shard.file).open("rb") as file:
            shards.append(replace(shard, first=file.read(shard.header_bytes)))
    return replace(plan, shards=tuple(shards))


def is_whole(shard: Shard, out: Path, entry: FileEntry) -> bool:
    """Whether a finished shard still has the plan's header and size, and its entry's checksum."""
    try:
        _check_header(shard, out)
        return "xxh3" not in entry or file_checksum(place_of(out, shard.file)) == entry["xxh3"]
    except (VerifyError, OSError):
        return False


def verify_checkpoint(
    out: str | Path,
    reporter: Reporter | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Verified:
    """Check every byte of a finished directory against the manifest and the sources.

    Sources that are missing or changed are not compared; a note names each of them.

    Raises:
        InputError: the directory is not a finished output of moemerge.
        VerifyError: a file does not match the manifest, or a tensor does not match its sources.
    """
    out, reporter, begun = folder_of(Path(out)), listener(reporter, progress), time.monotonic()
    manifest = open_manifest(out)
    plan = manifest.plan
    check_shards(out, plan, "verify")
    for shard in plan.shards:
        _check_header(shard, out)
    plan = with_heads(plan, out)
    _check_json(out / CONFIG_FILE, plan.config)
    if not plan.is_gguf:
        _check_json(out / INDEX_FILE, weight_index(plan))
    _check_strays(out, manifest)
    _check_routers(plan, out)
    sources, newer = available_sources(plan, reporter, cache_dir)
    compared = {
        tensor.name
        for tensor in plan.tensors
        if all(r.tensor in sources.get(r.source, ()) for r in recipe.reads(tensor.recipe))
    }
    size = sum(
        one.stat().st_size for one in (place_of(out, n) for n in manifest.files) if one.is_file()
    )
    _say_how_long(plan, out, sources, compared, size, reporter)
    if not all("xxh3" in manifest.files[shard.file] for shard in plan.shards):
        reporter.say(Line("no checksums were written: only sizes and sources are compared"))
    changed: dict[str, PlannedTensor] = {}
    with reporter.progress("verifying", size, "B") as advance:
        rounded = set[str]()
        for shard in plan.shards:
            otherwise, differ = _check_shard(
                shard, out, manifest, sources, compared, newer, advance
            )
            rounded |= otherwise
            for tensor in differ:
                compared.discard(tensor.name)
                changed |= {r.source: tensor for r in recipe.reads(tensor.recipe)}
        for name in manifest.files.keys() - {shard.file for shard in plan.shards}:
            advance(_check_small_file(name, out, manifest))
    if rounded:
        reporter.say(
            f"{len(rounded)} computed tensors ({min(rounded)}) differ from their sources in the "
            "last bits only: an earlier version of moemerge rounded them"
        )
    for name in newer & changed.keys():
        what = f"it changed since the merge: {changed[name].name} is different now"
        reporter.say(f"{name}: {what}; the output matches its own checksums")
    return Verified(size, len(compared), len(list(plan.tensors)), time.monotonic() - begun)


def _check_strays(out: Path, manifest: Manifest) -> None:
    """Refuse weight files that the manifest does not list, because some programs read them."""
    for path in sorted(out.iterdir()):
        if path.name.endswith(MODEL_SUFFIXES) and path.name not in manifest.files:
            raise VerifyError(f"{path}: does not belong to this model; move it away")


def _check_header(shard: Shard, out: Path) -> None:
    path = place_of(out, shard.file)
    try:
        with path.open("rb") as file:
            found = file.read(shard.header_bytes)
        size = path.stat().st_size
    except OSError as error:
        raise VerifyError(f"{path}: cannot be read ({error.strerror}); merge again") from error
    if not shard.is_header(found):
        raise VerifyError(f"{path}: its header is not the plan's; merge again with --overwrite")
    if size != shard.nbytes:
        raise VerifyError(f"{path}: is {size} bytes, the plan says {shard.nbytes}; merge again")


def _check_routers(plan: Plan, out: Path) -> None:
    import numpy as np

    shard = plan.shards[0]
    for start, tensor in zip(shard.starts(), shard.tensors, strict=True):
        if _of_a_gate(tensor):
            kind = ENCODINGS[tensor.dtype]
            at = Location(place_of(out, shard.file), start, kind, tensor.shape)
            if not np.isfinite(read_values(at, 0, tensor.parameters).astype(np.float32)).all():
                raise VerifyError(f"{tensor.name}: holds NaN or Inf; merge again")


def _of_a_gate(tensor: PlannedTensor) -> bool:
    """Whether a gate mode made the tensor."""
    return any(read.source == ROUTERS for read in recipe.reads(tensor.recipe))


def _check_json(path: Path, expected: object) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path}: cannot be read ({error}); merge again") from error
    if found != expected:
        raise VerifyError(f"{path}: is not what the plan says; it was changed after the merge")


def _check_shard(
    shard: Shard,
    out: Path,
    manifest: Manifest,
    sources: Sources,
    compared: set[str],
    newer: set[str],
    advance: Callable[[int], object],
) -> tuple[set[str], list[PlannedTensor]]:
    """Read a shard once: take its checksum, and compare its tensors with their recipes.

    Returns the names of tensors that differ only in rounding, and the tensors that differ because
    a source changed after the merge (`newer`) while the shard matches its checksum.

    Raises:
        VerifyError: the checksum is wrong, or a tensor differs for another reason.
    """
    file, path, rounded = ShardFile(shard, sources), place_of(out, shard.file), set[str]()
    differ: dict[str, PlannedTensor] = {}

    def check(at: tuple[int, int]) -> bytes:
        found, expected = read_chunk(path, *at), buffer(1)[: at[1]]
        file.fill(expected, at[0], only=compared)
        ours = zip(file.pieces(found, at[0]), file.pieces(expected, at[0]), strict=True)
        for (tensor, _, have), (_, _, want) in ours:
            if tensor is None or tensor.name not in compared or same_bytes(have, want):
                continue
            if not _is_made(have, want, tensor):
                differ[tensor.name] = tensor
            else:
                rounded.add(tensor.name)
        return chunk_digest(found)

    computes = any(t.name in compared and recipe.computes(t.recipe) for t in shard.tensors)
    digests = []
    with threads(_JOBS, computes) as pool:
        for digest in pool.map(check, chunks(file.nbytes)):
            digests.append(digest)
            advance(min(CHUNK_BYTES, file.nbytes - (len(digests) - 1) * CHUNK_BYTES))
    written = manifest.files[shard.file].get("xxh3")
    for tensor in differ.values():
        if written != checksum(digests) or newer.isdisjoint(
            read.source for read in recipe.reads(tensor.recipe)
        ):
            raise _differs(path, tensor)
    if written not in (None, checksum(digests)):
        raise VerifyError(f"{path}: its checksum is not the manifest's; merge or copy it again")
    return rounded - differ.keys(), list(differ.values())


def _check_small_file(name: str, out: Path, manifest: Manifest) -> int:
    """Check a file that has a checksum; others may be edited or removed. Returns its bytes."""
    expected = manifest.files[name].get("xxh3")
    if expected is None and not (out / name).exists():
        return 0
    try:
        size = (out / name).stat().st_size
        found = file_checksum(out / name) if expected else None
    except OSError as error:
        what = "is gone" if isinstance(error, FileNotFoundError) else "cannot be read"
        fix = "copy it back, or merge again"
        raise VerifyError(f"{out / name}: {what} ({error.strerror}); {fix}") from error
    if found != expected:
        raise VerifyError(f"{out / name}: is not what was written; it was changed after the merge")
    return size


def _say_how_long(
    plan: Plan, out: Path, sources: Sources, compared: set[str], whole: int, reporter: Reporter
) -> None:
    with reporter.progress("estimating the time", 1, "sample"):
        seconds = seconds_to_compare(plan, out, sources, compared, _JOBS)
    again = sum(tensor.nbytes for tensor in plan.tensors if tensor.name in compared)
    reporter.say(
        f"reading {size(whole)} and comparing {size(again)} with the sources: "
        f"about {max(seconds, 1):.0f} s"
    )


def _is_made(have: memoryview, want: memoryview, tensor: PlannedTensor) -> bool:
    """Whether a tensor's bytes `have` match the bytes `want` that its recipe gives now.

    Computed values may differ in rounding, because earlier versions summed a delta in an order that
    depended on the processor and its threads. Among 2-byte values, only few may differ.
    """
    import numpy as np

    numbers = tensor.dtype not in QUANTISED and recipe.computes(tensor.recipe)
    if same_bytes(have, want) or len(have) != len(want) or not numbers:
        return same_bytes(have, want)
    kind = numpy_dtype(tensor.dtype)
    found, made = (np.frombuffer(view, kind).astype(np.float32) for view in (have, want))
    apart = np.abs(found - made)
    bound = _ULP[tensor.dtype] * np.abs(made) + _SUM * np.abs(made).max()
    few = tensor.dtype == "F32" or (apart > 0).sum() <= 1 + _FEW * apart.size
    return bool(few and (apart <= bound).all())


def _differs(path: Path, tensor: PlannedTensor) -> VerifyError:
    return VerifyError(f"{path}: {tensor.name} is not what its sources give; merge again")
