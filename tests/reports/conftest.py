"""Studies that several tests look at, written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from parsed_page import Page, open_report
from study_directory import write_study


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of eight trials: trial 5 diverged before it was scored, trial 3 after."""
    directory = tmp_path_factory.mktemp("studies") / "finished"
    return write_study(directory, trials=8, promote=3, diverged=(5,), late=(3,))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study interrupted in its fourth trial."""
    return write_study(tmp_path_factory.mktemp("studies") / "running", trials=16, stop_at=3)


@pytest.fixture(scope="session")
def summary(finished: Path) -> dict[str, Any]:
    """The finished study's summary."""
    return json.loads((finished / "summary.json").read_text())


@pytest.fixture(scope="session")
def page(finished: Path) -> Page:
    """The finished study's report."""
    return open_report(finished)
