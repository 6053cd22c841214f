"""A configuration over the tiny task for experiments, and their trials without training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxtune.config import Config, load_config
from jaxtune.experiments import ablation, early_score
from tests.search.synthetic import REFERENCE, SyntheticRunner
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SPACE = "optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}, update.0.rank: {power_of_two: [2, 64]}, "
SPACE += "update.0.dropout: {uniform: [0.0, 0.3]}, optimizer.schedule: {choice: [cosine, linear]}"


@pytest.fixture
def make_config(config_file, tmp_path):
    """Makes a configuration with a search section over the space of the synthetic runner."""

    def make(*overrides: str, trials: int = 12) -> Config:
        values = ", ".join(f"{key}: {value}" for key, value in REFERENCE.items())
        search = f"search={{trials: {trials}, promote: 3, space: {{{SPACE}}}, reference: {{{values}}}}}"
        return load_config(config_file, [search, f"study.output={tmp_path / 'out'}", *overrides])

    return make


@pytest.fixture
def runner(monkeypatch) -> SyntheticRunner:
    """Trains the trials of every experiment: learning curves with a known order."""
    synthetic = SyntheticRunner()
    synthetic.opened = SimpleNamespace(fingerprints={})
    for study in (early_score, ablation):
        monkeypatch.setattr(study, "open_runner", lambda *_, **__: synthetic)
    return synthetic
