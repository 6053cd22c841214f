"""A run and a study that an earlier version began go on as if it had ended them: same bits, journal and adapter.

Where that is not to hold any more, remove the archive: the next tests record it anew.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.config import load_config
from jaxtune.config.hyperparameters import program_name
from jaxtune.search.run import search
from jaxtune.telemetry.writers import read_metrics
from jaxtune.training.run import train
from tests.tiny_task import configuration

RECORDED = Path(__file__).with_name("recorded") / "begun_before.tar.gz"
SETTINGS = ("train.steps=4", "train.checkpoint_every=2", "optimizer.learning_rate=1e-2")
RULES = (
    "update=[{match: 'layers.{0,1}.attention.{q,v}', method: low_rank, rank: 3, alpha: 8, dropout: 0.1}, "
    "{match: layers.*.mlp.up, method: low_rank, rank: 2, use_rslora: true, weight_decay: 0.1}, "
    "{match: layers.1.mlp_norm, method: full, learning_rate_scale: 2.0}, {match: '**.o', method: frozen}, "
    "{match: final_norm, method: full}]",
    "data.validation=null",
)
SEARCH = (
    "search={trials: 3, promote: 1, fraction: 0.5, initial: 3, seed: 1, space: {update.0.rank: {choice: [2, 4]}, "
    "optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}, update.0.dropout: {uniform: [0.0, 0.2]}}}",
)
SAME_BITS = True
"""False from the first change on that is meant to give a step other bits: then to rounding."""
_OF_THE_PROCESS = ("time", "seconds", "stopped", "compilations")


def make_project(folder: Path, model: Path, rows: Path) -> Path:
    """Model, data and a configuration that names them from its folder."""
    shutil.copytree(model, folder / "model")
    shutil.copytree(rows, folder / "data")
    text = configuration(Path("runs/run"), model, rows).replace(str(model), "model").replace(str(rows), "data")
    (folder / "my.yaml").write_text(text)
    return folder


def journal(directory: Path) -> Iterator[dict[str, Any]]:
    """Records of a study, without what says when, where and by which process."""
    for line in (directory / "trials.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] not in ("process", "resumed", "started", "stopped"):
            yield _timeless({key: value for key, value in record.items() if key not in _OF_THE_PROCESS})


def _timeless(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    return {key: _timeless(value) for key, value in record.items() if not key.endswith("_per_second")}


def metrics(directory: Path) -> list[dict[str, Any]]:
    """What was logged, without what a clock says."""
    records = read_metrics(directory / "metrics.jsonl")
    return [_timeless(one) for one in records]


def machine() -> list[str]:
    """Within which the same program gives the same bits."""
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    vectors = sorted(word for word in flags.split() if word.startswith(("avx", "fma", "amx")))
    return [jax.__version__, jaxlib.__version__, platform.machine(), *vectors]


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def near(found: Any, expected: Any, *, exact: bool) -> None:
    """Equal; elsewhere than where it was recorded, but for the last digits of numbers."""
    if exact or not isinstance(expected, dict | list | float):
        assert found == expected
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    else:
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            near(found[key], expected[key], exact=False)


def told(begun: Path) -> dict[str, Any]:
    """Where it was recorded, on which machine, and the name of the study's program."""
    return json.loads((begun / "whole" / "told.json").read_text())


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_model, rows) -> Path:
    """The project with the run and the study that were begun, and as they ended, in ``whole``."""
    folder = make_project(tmp_path_factory.mktemp("begun") / "project", tiny_model, rows)
    if not RECORDED.exists():
        # From a folder that is nobody's, as a run notes where it was told from.
        with contextlib.chdir(folder):
            record(folder)
        pytest.skip(f"{RECORDED} was recorded")
    with tarfile.open(RECORDED) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_run_goes_on(begun):
    whole, run = begun / "whole" / "run", begun / "runs" / "run"
    exact = SAME_BITS and told(begun)["machine"] == machine()
    summary = train(load_config(run / "config.yaml"), listener=None)
    assert (summary["stopped"], summary["steps"]) == ("finished", 4)
    near(metrics(run), metrics(whole), exact=exact)
    assert (run / "config.yaml").read_text() == (whole / "config.yaml").read_text()


def test_a_study_goes_on(begun):
    whole, study = begun / "whole" / "study", begun / "runs" / "study"
    exact = SAME_BITS and told(begun)["machine"] == machine()
    config = load_config(study / "config.yaml")
    assert program_name(config) == told(begun)["program"]
    summary = search(config, listener=None)
    assert summary is not None
    near(list(journal(study)), list(journal(whole)), exact=exact)
    ours, theirs = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (study, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        (np.testing.assert_array_equal if exact else np.testing.assert_allclose)(ours[name], value, err_msg=name)
    for name in () if not exact else ("adapter_config.json", "README.md"):
        ours, theirs = ((one / "adapter" / name).read_text() for one in (study, whole))
        assert ours.replace(str(begun), "") == theirs.replace(told(begun)["project"], "")


def record(folder: Path) -> None:
    """Begins and ends both in a project, and packs what there was at the stop and at the end."""
    for name, go, settings, steps in (("run", train, RULES, 2), ("study", search, SEARCH, 5)):
        asked = itertools.count(1)
        config = load_config(folder / "my.yaml", (*SETTINGS, *settings, f"run_dir={folder / 'runs' / name}"))
        go(config, listener=None, should_stop=lambda asked=asked, steps=steps: next(asked) > steps)
        run, whole = folder / "runs" / name, folder / "whole" / name
        shutil.copytree(run, whole / "begun")
        go(config, listener=None)
        for file in ("metrics.jsonl", "trials.jsonl", "config.yaml", "adapter"):
            if (run / file).exists():
                (shutil.copytree if (run / file).is_dir() else shutil.copy)(run / file, whole / file)
        shutil.rmtree(run)
        shutil.move(whole / "begun", run)
    told = {"project": str(folder), "machine": machine(), "program": program_name(config)}
    (folder / "whole" / "told.json").write_text(json.dumps(told))
    RECORDED.parent.mkdir(exist_ok=True)
    with tarfile.open(RECORDED, "w:gz") as archive:
        for name in ("runs", "whole"):
            archive.add(folder / name, name)
