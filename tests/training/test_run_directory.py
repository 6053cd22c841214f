"""Who may write into a run directory."""

from __future__ import annotations

import json

import pytest

from jaxtune.config import dotted, load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.training.run_directory import RunDirectory, different_keys


@pytest.fixture
def config(config_file):
    return load_config(config_file)


@pytest.fixture
def directory(config):
    return RunDirectory(config.directory)


def contents(directory):
    return {item.name: item.read_bytes() for item in directory.path.iterdir() if item.is_file()}


def test_the_resolved_configuration_is_written_once_and_repeats_the_run(config, directory):
    directory.check(config)
    assert not directory.path.exists()
    directory.claim(config)
    assert load_config(directory.config_path) == config
    before = directory.config_path.stat().st_mtime_ns
    directory.claim(config)
    directory.claim(load_config(directory.config_path))
    assert directory.config_path.stat().st_mtime_ns == before


def test_another_run_is_refused_with_every_key_that_differs(config, directory):
    directory.claim(config)
    kept = contents(directory)
    other = with_overrides(config, {"optimizer.learning_rate": 0.5, "update.0.rank": 2, "train.checkpoint_every": 3})
    for call in (directory.check, directory.claim):
        with pytest.raises(UserError) as error:
            call(other)
        message = str(error.value)
        assert str(directory.path) in message
        assert [line.strip() for line in message.splitlines() if line.startswith("  ")] == [
            "optimizer.learning_rate: there 0.0001, now 0.5",
            "train.checkpoint_every: there None, now 3",
            "update.0.rank: there 4, now 2",
        ]
    assert contents(directory) == kept


def test_what_is_kept_of_a_run_may_change_at_any_time(config, directory):
    directory.claim(config)
    directory.check(with_overrides(config, {"train.checkpoint_minutes": None, "train.keep.latest": 7}))


def test_many_differences_are_counted(config, directory):
    directory.claim(config)
    changes = {f"optimizer.{name}": 0.123 for name in ("learning_rate", "warmup", "final_scale", "weight_decay")}
    changes |= {f"optimizer.{name}": 0.123 for name in ("beta1", "beta2", "epsilon", "clip_norm")}
    with pytest.raises(UserError, match="and 2 more"):
        directory.check(with_overrides(config, {**changes, "train.seed": 4, "train.batch_size": 2}))


def test_files_of_something_else_and_a_file_in_its_place(config, directory):
    directory.path.mkdir()
    (directory.path / ".hidden").write_text("")
    directory.check(config)
    (directory.path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex.*run_dir="):
        directory.claim(config)
    assert (directory.path / "thesis.tex").read_text() == "years of work"
    assert not directory.config_path.exists()
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(directory.path / "thesis.tex").check(config)


def test_the_summary_is_strict_json_and_replaced_whole(config, directory):
    directory.claim(config)
    assert directory.read_summary() is None
    directory.write_summary({"steps": 3, "metrics": {"loss": None}})
    assert directory.read_summary() == {"steps": 3, "metrics": {"loss": None}}
    # A number that JSON does not know is refused before the file is touched.
    with pytest.raises(ValueError, match="JSON"):
        directory.write_summary({"loss": float("nan")})
    assert json.loads(directory.summary_path.read_text()) == {"steps": 3, "metrics": {"loss": None}}
    assert {item.name for item in directory.path.iterdir()} == {"config.yaml", "summary.json"}


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


def test_where_two_runs_lie_makes_no_difference_between_them(config_file):
    one = load_config(config_file)
    other = one.model_copy(update={"run_dir": "elsewhere", "paths_from": ["/somewhere"]})
    assert different_keys(dotted(one), dotted(other)) == []
    assert different_keys(dotted(one), dotted(with_overrides(other, {"train.seed": 5}))) == ["train.seed"]
