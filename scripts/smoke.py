"""The ordinary way on models made here: plan, merge, verify, by the `moemerge` beside this Python.

python scripts/smoke.py [--bare]

It needs no network and takes seconds. With --bare nothing but typer and PyYAML need be installed:
moemerge is imported and asked for its help, neither of which may need torch.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run it; any failure ends with a traceback and the exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bare", action="store_true", help="only the import and the help")
    if parser.parse_args().bare:
        _bare()
    else:
        with tempfile.TemporaryDirectory() as directory:
            _ordinary(Path(directory))
    import moemerge

    print(f"moemerge {moemerge.__version__} works: {Path(moemerge.__file__).parent}")


def _bare() -> None:
    import moemerge

    assert "merge" in dir(moemerge)
    assert "verify" in _moemerge("--help")
    heavy = {"numpy", "safetensors", "torch", "transformers"} & set(sys.modules)
    assert not heavy, f"imported: {heavy}"


def _ordinary(directory: Path) -> None:
    sys.path.append(str(ROOT / "tests"))
    babies = importlib.import_module("babies")
    models = [babies.make_model(directory / name, seed=seed) for seed, name in enumerate("ab")]
    config, out = directory / "config.yaml", directory / "out"
    config.write_text(babies.simple_config(models[0], models), encoding="utf-8")
    assert "2 experts" in _moemerge("plan", config)
    _moemerge(config, out)
    _moemerge("verify", out)

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 2


def _moemerge(*arguments: str | Path) -> str:
    program = Path(sysconfig.get_path("scripts")) / "moemerge"
    print("$ moemerge", *arguments, flush=True)
    done = subprocess.run([program, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.stdout


if __name__ == "__main__":
    main()
