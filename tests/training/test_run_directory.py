"""Who may write into a run directory."""

import json

import pytest

from jaxtune.config import load_config
from jaxtune.errors import UserError
from jaxtune.training.run_directory import RunDirectory


def test_a_run_and_a_study_refuse_each_other(config_file, tmp_path):
    config = load_config(config_file)
    run, study = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run", study=True)
    run.claim(config)
    study.check(config)  # nothing was written yet that tells which it is
    run.metrics_path.write_text("")
    run.check(config)
    with pytest.raises(UserError, match=r"holds a single run \(metrics\.jsonl\)"):
        study.check(config)
    run.metrics_path.rename(run.journal_path)
    study.check(config)
    with pytest.raises(UserError, match=r"holds a study \(trials\.jsonl\)"):
        run.check(config)


def test_one_process_at_a_time(config_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.claim(load_config(config_file))
    with run.locked(), pytest.raises(UserError, match="being run by process"), run.locked():
        pass
    with run.locked():
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00"])
def test_a_damaged_summary_is_named(tmp_path, text):
    run = RunDirectory(tmp_path)
    assert run.read_summary() is None
    run.summary_path.write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: not the summary of a run"):
        run.read_summary()
    run.write_summary({"stopped": "finished"})
    assert run.read_summary() == json.loads(run.summary_path.read_text())
