"""Data that change under a study: told before anything is proposed or changed, and gone on with on purpose only."""

from __future__ import annotations

import json

import pytest
from synthetic import REFERENCE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.config import dump_config, load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.experiments.trials import ExperimentTrials
from jaxtune.search import Study
from jaxtune.search.extend import extend
from jaxtune.search.run import make_study, preflight_search, search
from jaxtune.training.hooks import Hooks
from jaxtune.training.opened_config import read_fingerprints
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.template_date import with_date
from tests.changing_data import chats, day, edit, own_files
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["chats", "config_file", "day", "own_files", "rows", "tiny_model"]

NOW = {f"data.{part}": {"examples": 9, "digest": part} for part in ("train", "validation", "test")}
SEARCH = {
    "search": {
        "trials": 2,
        "promote": 1,
        "fraction": 0.34,
        "space": {"optimizer.learning_rate": {"uniform": [0.01, 0.02]}},
    }
}


def changed(part):
    return {**NOW, f"data.{part}": {"examples": 10, "digest": "other"}}


def study(run_dir, runner=None, **options):
    return Study(run_dir, search_config(), runner or SyntheticRunner(), reference=REFERENCE, **options)


def stopped(run_dir, **options):
    """A study that was stopped in its fifth trial; the text of its journal."""
    runner = SyntheticRunner()
    runner.before = interrupt_at(5, 10)
    assert study(run_dir, runner, **options).run() is None
    return (run_dir / "trials.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of a study that knows nothing of its data."""
    directory = tmp_path_factory.mktemp("whole")
    assert study(directory).run() is not None
    return records(directory)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_changed_split_is_refused_and_accepted_on_purpose(tmp_path, whole, caplog, part):
    before = stopped(tmp_path, data=NOW)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^data\.{part} \(9 examples then, 10 now\).*--accept-changed-data$"):
            study(tmp_path, data=changed(part)).run()
    assert (tmp_path / "trials.jsonl").read_text() == before
    assert study(tmp_path, data=changed(part), accept_changed_data=True).run() is not None
    assert f"data.{part} (9 examples then, 10 now): other data than the study in" in caplog.text
    # Proposals, scores and promotions are those of the same study without a change.
    written = records(tmp_path)
    assert written[0].pop("fingerprints") == NOW
    (told,) = [record for record in written if record["event"] == "data"]
    assert told["fingerprints"] == changed(part)
    assert [record for record in written if record is not told] == whole
    # From then on the data as they are now are the study's; those from before are not.
    assert study(tmp_path, data=changed(part)).run() is not None
    with pytest.raises(UserError, match=rf"^data\.{part} \(10 examples then, 9 now\)"):
        study(tmp_path, data=NOW).run()


def test_a_journal_from_before_gets_its_fingerprints_with_a_warning(tmp_path, whole, caplog):
    stopped(tmp_path)
    assert study(tmp_path, data=NOW).run() is not None
    assert "began before fingerprints of its data were kept" in caplog.text
    written = records(tmp_path)
    (told,) = [record for record in written if record["event"] == "data"]
    assert told["fingerprints"] == NOW
    assert [record for record in written if record is not told] == whole
    with pytest.raises(UserError, match=r"^data\.validation"):
        study(tmp_path, data=changed("validation")).run()
    caplog.clear()
    # The test split decides nothing: a change of it is told, once.
    for told in (1, 0):
        study(tmp_path, data=changed("test")).run()
        assert caplog.text.count("data.test (9 examples then, 10 now)") == told
        caplog.clear()


def begin(config, run_dir):
    """A stopped study of made-up scores over the configuration's data, as its command would start it."""
    config = with_date(with_overrides(config, {**SEARCH, "run_dir": str(run_dir)}))
    RunDirectory(run_dir, study=True).claim(config)
    runner = SyntheticRunner(divergence=1.0)
    runner.before = interrupt_at(1, 17)
    assert make_study(config, runner, data=read_fingerprints(config)).run() is None
    return config


def contents(run_dir):
    return {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file() and path.suffix != ".lock"}


@pytest.mark.slow
def test_a_study_is_extended_on_its_own_data_only(own_files, tmp_path):
    run_dir = tmp_path / "run"
    begin(own_files, run_dir)
    before = contents(run_dir)
    for part in ("train", "validation"):
        file = tmp_path / f"{part}.jsonl"
        text = file.read_text()
        edit(file)
        for options in ({}, {"added": [{"optimizer.learning_rate": 0.0125}]}, {"write": False}):
            with pytest.raises(UserError, match=rf"^data\.{part} \(.*other data than the study in"):
                extend(run_dir, ["search.trials=4"], **options)
        assert contents(run_dir) == before
        file.write_text(text)
    assert extend(run_dir, ["search.trials=3"]).changed == {"trials": 3}
    edit(tmp_path / "validation.jsonl")
    extend(run_dir, ["search.trials=4"], accept_changed_data=True)
    assert extend(run_dir, ["search.trials=5"]).changed == {"trials": 5}, "accepted once for all"
    events = [record["event"] for record in records(run_dir)]
    assert events.count("data") == 1


def test_a_study_that_is_extended_next_day_shows_the_same_day(chats, tmp_path, day):
    run_dir = tmp_path / "run"
    day(5)
    begun = begin(chats, run_dir)
    day(6)
    extension = extend(run_dir, ["search.trials=3"])
    assert extension.config.data.date == begun.data.date == "2026-01-05"
    assert read_fingerprints(extension.config) == read_fingerprints(begun)
    # The file that it was started with has no date, and means the study's.
    again = with_date(with_overrides(chats, {**SEARCH, "run_dir": str(run_dir)}))
    assert again.data.date == "2026-01-05"
    # A study from before, whose day nobody wrote down, shows that of its first record.
    journal, file = run_dir / "trials.jsonl", run_dir / "config.yaml"
    first, *others = [json.loads(line) for line in journal.read_text().splitlines()]
    del first["config"]["data"]["date"], first["fingerprints"]
    first["time"] = 1.5e9
    journal.write_text("".join(json.dumps(record) + "\n" for record in (first, *others)))
    file.write_text(dump_config(with_overrides(load_config(file), {"data.date": None})))
    assert extend(run_dir, ["search.trials=4"]).config.data.date == "2017-07-14"
    # Two days that are both written down and differ make two studies.
    first["config"]["data"]["date"] = "2016-01-01"
    journal.write_text("".join(json.dumps(record) + "\n" for record in (first, *others)))
    with pytest.raises(UserError, match=r"data\.date is \"2016-01-01\" there and \"2017-07-14\" here"):
        extend(run_dir, ["search.trials=5"])


@pytest.mark.slow
def test_trials_under_way_go_on_with_data_that_were_accepted(own_files, tmp_path, caplog, monkeypatch):
    """Through the trainer: a promoted trial continues from its checkpoint, among other examples, and fewer."""
    config = with_overrides(own_files, {**SEARCH, "data.test": None, "train.batch_size": 16, "train.steps": 6})
    ended: list[str] = []
    scored = lambda event, trial, record: ended.append(event)  # noqa: E731
    assert search(config, on_event=scored, should_stop=lambda: ended.count("scored") == 2) is None
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:16]))
    for call in (search, preflight_search):
        with pytest.raises(UserError, match=r"^data\.train \(64 examples then, 16 now\)"):
            call(config)
    shown: list[str] = []
    monkeypatch.setattr("jaxtune.search.run.watched", lambda title, board: shown.append(title))
    summary = search(config, accept_changed_data=True)
    assert summary is not None
    assert set(shown) == {f"trial {trial['id']}" for trial in summary.trials if trial["final_score"] is not None}
    assert summary.best["command"] in json.dumps(search(config))
    assert sum(trial["final_score"] is not None for trial in summary["trials"]) == 2
    assert summary["budget"]["steps_run"] == 12, "nothing was trained twice"


def test_an_experiment_goes_on_with_its_own_data_only(own_files, tmp_path):
    config = with_overrides(own_files, SEARCH)

    def go_on(data, **hooks):
        with ExperimentTrials(
            config, "early-score", SyntheticRunner(), settings={}, hooks=Hooks(**hooks), data=data
        ) as trials:
            return [record["event"] for record in records(trials.run_dir)]

    assert go_on(NOW) == ["study"]
    assert go_on(NOW) == ["study"]
    with pytest.raises(UserError, match=r"^data\.validation .*other data than the experiment in"):
        go_on(changed("validation"))
    assert go_on(changed("validation"), accept_changed_data=True) == ["study", "data"]
