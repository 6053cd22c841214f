"""What a trial finds in its directory."""

from jaxtune.search.trainer_runner import _set_aside


def _trial(directory, config, step):
    (directory / "checkpoints" / str(step)).mkdir(parents=True)
    (directory / "config.yaml").write_text(config)


def test_a_trial_goes_on_from_its_own_files_only(tmp_path):
    directory = tmp_path / "000"
    _set_aside(directory, "rate: 1", 4)
    directory.mkdir()
    _set_aside(directory, "rate: 1", 4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["000"]
    _trial(directory, "rate: 1", 4)
    _set_aside(directory, "rate: 1", 4)
    _set_aside(directory, "rate: 1", 20)
    assert (directory / "checkpoints" / "4").is_dir()
    # Beyond the step that it is to be scored at, and another trial's: both would give a wrong score.
    _set_aside(directory, "rate: 1", 3)
    assert not directory.exists()
    _trial(directory, "rate: 2", 2)
    _set_aside(directory, "rate: 1", 4)
    assert not directory.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"000.1", "000.2"}
    assert (tmp_path / "000.1" / "checkpoints" / "4").is_dir(), "nothing is lost"
