"""What is published: the wheel is the whole package, the source distribution can test itself."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from try_package import ROOT, build, files, try_one


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel."""
    return build(tmp_path_factory.mktemp("built"))


def test_the_wheel_is_the_whole_package(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in files() if name.startswith("moemerge/")}
    assert {Path(name).suffix for name in held} == {".py", ".typed", ".html", ".css", ".js"}


def test_the_source_distribution_holds_every_file(built: tuple[Path, Path]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is one: it lists its own files")
    with tarfile.open(built[0]) as sdist:
        held = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert set(files()) <= held


def test_installed_alone_it_works(built: tuple[Path, Path], tmp_path: Path) -> None:
    try_one(built[1], tmp_path / "env")
