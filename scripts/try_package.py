"""Build the source distribution and the wheel, install each into an empty place, and use it there.

    python scripts/try_package.py            dependencies are this environment's: seconds
    python scripts/try_package.py --clean    everything is installed from PyPI: minutes

The wheel is built from the source distribution's own files. What is used is scripts/smoke.py. With
--clean the wheel is installed alone and the source distribution with all extras, both at the
versions of scripts/constraints.txt, so that this environment needs nothing but pip.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "datasets,eval,ray,report,train"
CONSTRAINED = ("--constraint", str(ROOT / "scripts/constraints.txt"))


def main() -> None:
    """Build and try both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clean", action="store_true", help="install everything from PyPI")
    clean: bool = parser.parse_args().clean
    with tempfile.TemporaryDirectory() as directory:
        temporary = Path(directory)
        builder = sys.executable
        if clean:
            builder = str(_environment(temporary / "builder"))
            _run(*_install_into(builder), "setuptools>=77")
        sdist, wheel = build(temporary, builder)
        for package, extras in ((wheel, ""), (sdist, f"[{EXTRAS}]" if clean else "")):
            print(f"{package.name}{extras}:", flush=True)
            try_one(package, temporary / f"env{package.suffix}", extras, clean)


def build(directory: Path, python: str = sys.executable) -> tuple[Path, Path]:
    """The source distribution of a copy of this tree, and the wheel of that."""
    dist = directory / "dist"
    sdist = dist / _hook(python, copy_to(directory / "copy"), "build_sdist", dist)
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "unpacked", filter="data")
    (source,) = (directory / "unpacked").iterdir()
    return sdist, dist / _hook(python, source, "build_wheel", dist)


def copy_to(directory: Path) -> Path:
    """The files of this tree in another directory."""
    for name in files():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    return directory


def files() -> list[str]:
    """The files of this tree, as git knows them, or as an unpacked source distribution does."""
    if not (ROOT / ".git").exists():
        return (ROOT / "moemerge.egg-info/SOURCES.txt").read_text(encoding="utf-8").splitlines()
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in found.splitlines() if (ROOT / name).is_file()]


def try_one(package: Path, env: Path, extras: str = "", clean: bool = False) -> None:
    """Install a package into a new environment and run the smoke test by it."""
    python = _environment(env)
    pip = _install_into(python)
    if clean:
        _run(*pip, *CONSTRAINED, "torch")
        _run(*pip, *CONSTRAINED, f"{package}{extras}")
    else:
        site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        _run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", package)
    said = _run(python, ROOT / "scripts/smoke.py")
    print(said, flush=True)
    assert str(env) in said.splitlines()[-1]  # not this tree's


def _install_into(python: str | Path) -> list[str]:
    return [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]


def _environment(env: Path) -> Path:
    venv.create(env)
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _hook(python: str, source: Path, name: str, dist: Path) -> str:
    """The name of what a hook of the build backend made (PEP 517)."""
    code = f"from setuptools import build_meta as b; print(b.{name}({str(dist)!r}))"
    return _run(python, "-c", code, directory=source).splitlines()[-1]


def _run(*command: str | Path, directory: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=directory, env=environment
    ).stdout


if __name__ == "__main__":
    main()
