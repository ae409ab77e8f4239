"""The notebook runs from top to bottom, as a user would run it."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from imaging.synthetic import make_dataset

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "notebooks").mkdir()
    make_dataset(tmp_path / "data/demo", num_images=520, size=48)  # smaller than the notebook's
    notebook = nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)
    (training,) = (cell for cell in notebook.cells if "num_steps = len" in cell.source)
    training.source = training.source.replace(
        "len(train_set.classes), 500", "len(train_set.classes), 60"
    )
    assert "60" in training.source
    client = NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    )
    client.execute()
    shown = [
        kind
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        for kind in output.get("data", {})
    ]
    assert shown.count("image/png") >= 5 and "text/html" in shown
    assert (tmp_path / "models/notebook/model.pth").exists()
