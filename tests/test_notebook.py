"""The notebook runs as it stands, and its kept outputs are of such a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"


def outputs(notebook: dict[str, Any]) -> dict[str, list[Any]]:
    """Outputs of the code cells, by the first word of their sources that tells them apart."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return {"".join(cell["source"]): cell["outputs"] for cell in cells}


def shown(notebook: dict[str, Any]) -> str:
    """All that the cells print."""
    return "".join("".join(out.get("text", "")) for outs in outputs(notebook).values() for out in outs)


def check(notebook: dict[str, Any]) -> None:
    kinds = [out["output_type"] for outs in outputs(notebook).values() for out in outs]
    assert "error" not in kinds
    pictures = [out for outs in outputs(notebook).values() for out in outs if "image/png" in out.get("data", {})]
    assert len(pictures) == 1
    text = shown(notebook)
    for part in ("plan    40 steps x 32 samples", "adapter out/quickstart/final", "What does the fox eat?\n  base"):
        assert part in text


def test_the_kept_outputs_are_of_a_run_that_went_well() -> None:
    check(json.loads(NOTEBOOK.read_text()))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_the_notebook_runs_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for folder in ("checkpoints", "finetune"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.update({"outputs": []} if cell.cell_type == "code" else {})
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1000, kernel_name="python3", resources=resources).execute()
    check(notebook)
