"""Ray: shards as tasks of a real local cluster, one of whose workers is killed half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from babies import simple_config, write_config

from moemerge import Options, RunError, merge
from moemerge.reporting import Silent

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
ROOT = Path(__file__).resolve().parent.parent


class KillsAWorker(Silent):
    """Hears the progress; half-way it kills a worker of the cluster outright."""

    def __init__(self, cluster: Any, worker: Any):
        self.cluster, self.worker, self.killed = cluster, worker, False

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Count the bytes that are finished."""
        finished = 0

        def advance(nbytes: int) -> None:
            nonlocal finished
            finished += nbytes
            if finished > total / 2 and not self.killed:
                self.cluster.remove_node(self.worker, allow_graceful=False)
                self.killed = True

        yield advance


def test_two_workers_one_killed_same_bytes(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    base, first, second = babies.values()
    text = simple_config(base, [first, second], "gate_mode: random", "noise_scale: 0.1")
    config = write_config(tmp_path / "c.yaml", text)
    merge(config, tmp_path / "here", Options(shard_size="8KB"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        killer = KillsAWorker(cluster, workers[0])
        options = Options(shard_size="8KB", ray=cluster.address)
        merge(config, tmp_path / "there", options, killer)
    finally:
        cluster.shutdown()
    assert killer.killed
    here, there = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("here", "there")
    )
    assert len(here) > 12
    assert here == there


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, babies: dict[str, Path]) -> None:
    text = simple_config(babies["base"], [babies["first"], babies["base"]], "gate_mode: random")
    config = write_config(tmp_path / "c.yaml", text)
    with pytest.raises(RunError, match=r"^Ray: [^\n]*run the same command again"):
        merge(config, tmp_path / "out", Options(ray="127.0.0.1:1"))
    assert not (tmp_path / "out/config.json").exists()
