"""The notebook's one cell, run in a real kernel on small models, pushing to a Hub."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from babies import make_model, simple_config
from fake_hub import FakeHub
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/moemerge.ipynb"


def cell_with(**values: str) -> nbformat.NotebookNode:
    """The notebook with other values of its settings, which stand at the top of its one cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code")
    head, mark, rest = cell.source.partition("\nimport html\n")
    assert all(f"{name} = " in head for name in values) and mark
    settings = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell.source = f"{head}\n{settings}\n{mark}{rest}"
    return notebook


def test_the_cell_merges_shows_and_pushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_model(tmp_path / name, seed=seed) for seed, name in enumerate(["one", "two"])]
    with FakeHub() as hub:
        hub.publish("user/one", models[0])
        hub.publish("user/two", models[1])
        hub.account("token", "user")
        environment = {**hub.environment(tmp_path / "home"), "HF_TOKEN": "token"}
        for name, value in {**environment, "PYTHONPATH": str(ROOT)}.items():
            monkeypatch.setenv(name, value)
        config = simple_config("user/one", ["user/one", "user/two"])
        notebook = cell_with(CONFIG=config, OUT=str(tmp_path / "out"), PUSH_TO="user/mixture")
        NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        printed = "".join(output.text for output in outputs if output.output_type == "stream")
        assert "parameters" in printed and f"{hub.url}/user/mixture" in printed
        pages = [o.data["text/html"] for o in outputs if o.output_type == "display_data"]
        assert any("<iframe srcdoc=" in page for page in pages)
        pushed = hub.repositories["user/mixture"].find("main")
        assert pushed is not None and "config.json" in pushed.files
    assert (tmp_path / "out/config.json").exists()


def test_the_cell_runs_on_the_demo_experts(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = (ROOT / "examples/configs/quickstart.yaml").read_text(encoding="utf-8")
    config = config.replace("../models/SmolLM2-135M-Instruct", str(smollm2))
    config = config.replace("../experts", str(ROOT / "examples/experts"))
    notebook = cell_with(CONFIG=config, OUT=str(tmp_path / "out"))
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert (
        re.search(r"373,\d{3},\d{3} parameters", printed) and "find their expert first" in printed
    )
