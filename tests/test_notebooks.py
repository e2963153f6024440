"""The notebooks, executed on the demo's model in a few steps."""

import os
import re
import sys
from pathlib import Path

import pytest

from conftest import REPO

pytestmark = pytest.mark.slow
FEW = {  # what a cell of a notebook's settings says, and what it is here
    "quickstart": ('SETTINGS = ""', 'SETTINGS = "--trainer.max_steps 2 --trainer.limit_val_batches 1"'),
    "lightning_users": ("STEPS = 40", "STEPS = 6"),
}


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Executes a notebook in an empty folder, without a network, and gives the printed text of its cells."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")

    def execute(name):
        notebook = nbformat.read(REPO / "notebooks" / f"{name}.ipynb", as_version=4)
        old, new = FEW[name]
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        cell.source = cell.source.replace(old, new)
        client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        return "\n".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs
        ), outputs

    return execute


def test_the_quickstart_trains_and_asks(executed, tmp_path):
    text, outputs = executed("quickstart")
    assert "error:" not in text, text[-3000:]
    (run,) = tmp_path.glob("lightning_logs/version_*")
    assert (run / "huggingface" / "config.json").is_file()
    assert re.search(r"step +0: \w", text) and re.search(r"step +2: \w", text)
    assert any("srcdoc" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert "rows.csv: 4 rows read, 4 pairs" in text


def test_the_notebook_for_lightning_users(executed):
    text, _ = executed("lightning_users")
    assert re.search(r"chosen: ' SELECT", text) and re.search(r"rejected: ' SELECT", text)
    assert re.search(r"step +5: margin", text)
    assert "'val/rewards/margins'" in text
    assert re.search(r"step +0: loss \d", text)


@pytest.mark.parametrize("name", FEW)
def test_a_notebook_has_no_errors_and_no_paths_of_a_machine(name):
    text = (REPO / "notebooks" / f"{name}.ipynb").read_text()
    assert '"output_type": "error"' not in text and not re.search(r"/(home|root|work|tmp)/", text)
