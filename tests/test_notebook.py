"""docs/first_search.ipynb runs, from an empty folder and without a network, and ends in right answers.

``python tests/test_notebook.py`` runs it and writes what its cells print into it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "first_search.ipynb"


def executed(folder: Path) -> Any:
    """The notebook after running it in a folder, with what a reader needs of its outputs."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Manager(AsyncKernelManager):
        """Starts this Python, whatever kernels the machine has."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    environment["COLUMNS"] = "100"
    client = NotebookClient(notebook, timeout=400, km=Manager(), resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # Progress goes to stderr or is displayed; tables have the escape codes of a terminal, and are padded.
            kept = [output for output in cell.outputs if output.output_type in ("stream", "execute_result")]
            cell.outputs = [output for output in kept if output.get("name") != "stderr"]
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = re.sub(r"\x1b\[\d+m|[ ]+$", "", output.text, flags=re.M)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def printed(notebook: Any) -> str:
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def right_answers(text: str) -> int:
    (count,) = re.findall(r"^(\d+) of 12 right$", text, flags=re.M)
    return int(count)


@pytest.mark.slow
def test_the_notebook_goes_from_data_to_answers(tmp_path):
    for module in ("torch", "nbclient", "ipykernel"):
        pytest.importorskip(module)
    text = printed(executed(tmp_path))
    assert (tmp_path / "winner" / "model.safetensors").is_file()
    # The colours of a page are a guess among several; the untuned model answers none.
    assert right_answers(text) >= 7


def test_the_outputs_that_are_committed_are_of_this_notebook():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert right_answers(printed(notebook)) >= 7
    assert not re.search(r"/(home|root|tmp|work|Users)/|site-packages", text), "a path of somebody's machine"
    assert len(text) < 20_000


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), NOTEBOOK)
