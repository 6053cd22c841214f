"""A study that is changed after its start: by settings, by hand, by a value held fast; and goes on."""

from __future__ import annotations

import json

import pytest
from synthetic import SyntheticRunner, interrupt_at, records

from jaxtune.config import dump_config, load_config
from jaxtune.errors import UserError
from jaxtune.files import write_atomically
from jaxtune.search.extend import extend, parse_assignments
from jaxtune.search.header import amended_header
from jaxtune.search.journal import Journal, read_journal
from jaxtune.search.run import make_study
from jaxtune.search.status import read_status
from jaxtune.training.run_directory import RunDirectory
from tests.tiny_task import config_file, configuration, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SEARCH = (
    "search={trials: 6, promote: 2, initial: 3, space: {optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}, "
    "update.0.rank: {power_of_two: [2, 64]}, update.0.dropout: {uniform: [0.0, 0.3]}, "
    "optimizer.schedule: {choice: [cosine, linear]}}}"
)
HAND = {"optimizer.learning_rate": 2e-3, "update.0.rank": 32, "update.0.dropout": 0.0, "optimizer.schedule": "linear"}


def go_on(run_dir, runner=None):
    """Runs the study whose configuration stands in its directory."""
    config = load_config(run_dir / "config.yaml")
    directory = RunDirectory(run_dir, study=True)
    directory.check(config)
    return make_study(config, runner or SyntheticRunner()).run()


@pytest.fixture
def begin(config_file, tmp_path):
    """Runs a study of the tiny configuration over made-up scores, to its end or to an interruption."""

    def run(runner=None, *overrides):
        config = load_config(config_file, [SEARCH, *overrides])
        RunDirectory(config.directory, study=True).claim(config)
        make_study(config, runner or SyntheticRunner()).run()
        return tmp_path / "run"

    return run


@pytest.fixture(scope="module")
def over(tmp_path_factory, tiny_model, rows):
    """A finished study for tests that leave it as it is."""
    directory = tmp_path_factory.mktemp("over")
    file = directory / "run.yaml"
    file.write_text(configuration(directory / "run", tiny_model, rows))
    config = load_config(file, [SEARCH])
    RunDirectory(config.directory, study=True).claim(config)
    make_study(config, SyntheticRunner()).run()
    return directory / "run"


def final_scores(summary):
    return {trial["id"]: trial["final_score"] for trial in summary["trials"] if trial["final_score"] is not None}


def test_a_finished_study_goes_on_with_more_trials(begin):
    run_dir = begin()
    first = json.loads((run_dir / "summary.json").read_text())
    before = records(run_dir)
    extension = extend(run_dir, ["search.trials=10", "search.promote=3"])
    assert extension.changed == {"trials": 10, "promote": 3}
    assert extension.left == 4
    assert not (run_dir / "summary.json").exists(), "the old end is not true any more"
    assert read_status(run_dir).phase == "scoring"
    runner = SyntheticRunner()
    summary = go_on(run_dir, runner)
    assert summary is not None
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert records(run_dir)[: len(before)] == before, "the journal only grows"
    assert {number for number, until in runner.calls if until == 10} == {6, 7, 8, 9}
    # What was scored and finished keeps its scores, and is not run again.
    assert final_scores(first).items() <= final_scores(summary).items()
    assert not {number for number, until in runner.calls if until == 50} & final_scores(first).keys()
    assert len(summary["trials"]) == 10
    # The three best of all ten are finished, whenever they were proposed.
    last = [record for record in records(run_dir) if record["event"] == "proposed"][-1]
    assert last["told"] == list(range(8)), "the reference included, which lies in the space"
    status = read_status(run_dir)
    assert (status.planned, status.promote, status.phase) == (10, 3, "finished")
    assert final_scores(summary)[summary["best"]["trial"]] == min(final_scores(summary).values())


def test_new_trials_take_the_places_of_old_ones_in_the_ranking(begin):
    """A much better configuration by hand is finished although as many as are to be were finished before."""
    run_dir = begin()
    promoted = {record["trial"] for record in records(run_dir) if record["event"] == "promoted" and record["leg"] == 1}
    extension = extend(run_dir, added=[{"optimizer.learning_rate": 1e-3, **{k: HAND[k] for k in list(HAND)[1:3]}}])
    assert extension.added == {6: {**HAND, "optimizer.learning_rate": 1e-3, "optimizer.schedule": "cosine"}}, (
        "what is not named is as in the configuration"
    )
    assert extension.changed == {"trials": 7}
    summary = go_on(run_dir)
    assert summary is not None
    assert summary["best"]["trial"] == 6
    proposed = {record["trial"]: record for record in records(run_dir) if record["event"] == "proposed"}
    assert proposed[6]["source"] == "hand"
    assert promoted < final_scores(summary).keys()


def test_a_study_that_ended_with_its_budget_goes_on_with_a_larger_one(begin):
    """Ten steps to a score, forty to an end: 4 trials and 3 ends, then 10 and 5, as others may be the best now."""
    run_dir = begin(None, "search.trials=30", "search.budget.steps=165", "search.finish=[1.0]")
    first = json.loads((run_dir / "summary.json").read_text())
    assert (first["ended"], len(first["trials"])) == ("budget", 4)
    assert read_status(run_dir).phase == "finished"
    extension = extend(run_dir, ["search.budget.steps=305"])
    assert extension.changed == {"budget": {"seconds": None, "steps": 305, "flops": None}}
    summary = go_on(run_dir)
    assert summary is not None
    assert (summary["ended"], len(summary["trials"])) == ("budget", 10)
    assert summary["budget"]["steps_run"] <= 305


def test_a_trial_by_hand_is_the_next_one_and_is_told(begin):
    runner = SyntheticRunner()
    runner.before = interrupt_at(3, 10)
    run_dir = begin(runner)
    extension = extend(run_dir, added=[HAND])
    assert extension.added == {4: HAND}
    summary = go_on(run_dir)
    assert summary is not None
    assert [trial["id"] for trial in summary["trials"]] == list(range(7))
    assert summary["trials"][4]["configuration"] == HAND
    proposed = {record["trial"]: record for record in records(run_dir) if record["event"] == "proposed"}
    assert 4 in proposed[6]["told"]


def test_a_fixed_value_holds_from_then_on(begin):
    runner = SyntheticRunner()
    runner.before = interrupt_at(4, 10)
    run_dir = begin(runner)
    extension = extend(run_dir, ["search.trials=9"], fixed={"update.0.rank": 16.0, "update.0.dropout": 0.125})
    assert extension.changed == {"trials": 9, "fixed": {"update.0.rank": 16.0, "update.0.dropout": 0.125}}
    summary = go_on(run_dir)
    assert summary is not None
    later = [trial["configuration"] for trial in summary["trials"][5:]]
    assert all(one["update.0.rank"] == 16 and one["update.0.dropout"] == 0.125 for one in later)
    assert len({one["optimizer.learning_rate"] for one in later}) == 4
    earlier = {trial["configuration"]["update.0.rank"] for trial in summary["trials"][1:5]}
    assert earlier != {16}
    # The surrogate is told of the trials from before, which lie off the slice.
    last = [record for record in records(run_dir) if record["event"] == "proposed"][-1]
    assert last["told"] == list(range(7))
    assert len(summary["importance"]) == 4
    extend(run_dir, ["search.trials=11"], freed=["update.0.rank"])
    summary = go_on(run_dir)
    assert summary is not None
    assert [one["configuration"]["update.0.dropout"] for one in summary["trials"][9:]] == [0.125, 0.125]
    assert amended_header(read_journal(run_dir), run_dir)["fixed"] == {"update.0.dropout": 0.125}


def test_an_extended_study_repeats_itself_after_a_kill(begin, tmp_path):
    run_dir = begin()
    journal = run_dir / "trials.jsonl"
    extend(run_dir, ["search.trials=9"], fixed={"update.0.rank": 16})
    start = journal.read_bytes()
    go_on(run_dir)
    whole = records(run_dir)
    journal.write_bytes(start)
    (run_dir / "summary.json").unlink()
    for at in ((6, 10), (8, 10)):
        runner = SyntheticRunner()
        runner.before = interrupt_at(*at)
        assert go_on(run_dir, runner) is None
    assert go_on(run_dir) is not None
    assert records(run_dir) == whole


def test_a_killed_change_is_made_good_by_the_next(begin, monkeypatch):
    """The journal has the change, ``config.yaml`` not yet."""
    run_dir = begin()
    old = (run_dir / "config.yaml").read_text()
    extend(run_dir, ["search.trials=8"])
    new = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(old)
    with pytest.raises(
        UserError, match=r"search\.trials is 8 there and 6 here; to change the study: jaxtune study ext"
    ):
        go_on(run_dir)
    extension = extend(run_dir)
    assert (extension.changed, extension.left) == ({}, 2)
    assert (run_dir / "config.yaml").read_text() == new
    assert go_on(run_dir) is not None
    # Without a change the end stands.
    extend(run_dir)
    assert (run_dir / "summary.json").exists()


def test_nothing_is_written_on_a_dry_run(over):
    run_dir = over
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "study.lock"}
    assert extend(run_dir, ["search.trials=9"], write=False).left == 3
    assert before == {
        path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "study.lock"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"overrides": ["search.fraction=0.5"]},
            r"search\.fraction: cannot change .*; search\.trials and search",
        ),
        ({"overrides": ["search.trails=9"]}, r"did you mean 'search\.trials'"),
        ({"overrides": ["search.trials"]}, r"expected search\.trials=…"),
        ({"overrides": ["search.trials=many"]}, r"search\.trials.*integer"),
        ({"overrides": ["search.trials=5"]}, r"5 is less than the 6 trials that were proposed; give at least 6"),
        ({"overrides": ["search.promote=7"]}, "promote 7 is above trials 6"),
        (
            {"fixed": {"update.0.rnk": 4}},
            r"search\.fixed: 'update\.0\.rnk' is not searched; did you mean 'update.0.ran",
        ),
        ({"fixed": {"update.0.rank": 5}}, r"search\.fixed\.update\.0\.rank: 5 is outside .*power_of_two \[2, 64\]"),
        ({"fixed": HAND}, "fixes every searched key"),
        ({"freed": ["update.0.rank"]}, "--free update.0.rank: it is not fixed"),
        ({"added": [{"update.0.ranks": 4}]}, r"--add update\.0\.ranks: not searched; did you mean 'update\.0\.rank'"),
        (
            {"added": [{"update.0.rank": 128}]},
            r"--add update\.0\.rank=128: outside .*power_of_two \[2, 64\]; jaxtune tr",
        ),
        ({"added": [HAND, HAND]}, "trial 6 has this configuration already"),
        ({"added": [HAND], "overrides": ["search.trials=6"]}, "6 is less than the 7 trials that .* or are added"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_and_changes_nothing(over, arguments, message):
    run_dir = over
    before = (run_dir / "trials.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        extend(run_dir, **arguments)
    assert (run_dir / "trials.jsonl").read_bytes() == before
    assert (run_dir / "summary.json").exists()


def test_a_finite_space_runs_out_on_the_slice(begin):
    space = "{update.0.rank: {power_of_two: [2, 16]}, optimizer.schedule: {choice: [cosine, linear]}}"
    search = f"search={{trials: 4, promote: 1, initial: 2, space: {space}}}"

    class Flat(SyntheticRunner):
        def floor(self, configuration):
            return super().floor({"optimizer.learning_rate": 1e-3, **configuration})

        def value(self, configuration, step):
            return self.floor(configuration) - step / 1000

    run_dir = begin(Flat(), search)
    taken = {
        record["configuration"]["update.0.rank"]
        for record in records(run_dir)
        if record["event"] == "proposed" and record["configuration"].get("optimizer.schedule") == "cosine"
    }
    free = len({2, 4, 8, 16} - taken)
    with pytest.raises(UserError, match=rf"fixed at cosine holds only 4 .* lower search\.trials to {4 + free}"):
        extend(run_dir, [f"search.trials={5 + free}"], fixed={"optimizer.schedule": "cosine"})
    extend(run_dir, [f"search.trials={4 + free}"], fixed={"optimizer.schedule": "cosine"})
    summary = go_on(run_dir, Flat())
    assert summary is not None
    assert {trial["configuration"]["update.0.rank"] for trial in summary["trials"][4:]} == {2, 4, 8, 16} - taken


def test_a_running_study_and_none_are_refused_and_a_moved_one_goes_on(begin, tmp_path):
    run_dir = begin()
    with Journal(run_dir), pytest.raises(UserError, match=r"being run by process \d+ .*jaxtune study stop"):
        extend(run_dir, ["search.trials=8"])
    moved = run_dir.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"did you mean '{moved}'"):
        extend(tmp_path / "move", ["search.trials=8"])
    assert extend(moved, ["search.trials=8"]).config.directory == str(moved)
    assert "run_dir: " + str(moved) in (moved / "config.yaml").read_text()


def test_a_configuration_of_another_study_is_refused_before_the_change(begin):
    run_dir = begin()
    config = load_config(run_dir / "config.yaml", ["train.batch_size=4"])
    write_atomically(run_dir / "config.yaml", dump_config(config))
    with pytest.raises(UserError, match=r"train\.batch_size is 8 there and 4 here"):
        extend(run_dir, ["search.trials=8"])


def test_assignments_are_read():
    assert parse_assignments("a.b=1e-3,c=linear", "--add") == {"a.b": 1e-3, "c": "linear"}
    assert parse_assignments("update.0.match=layers.*.{q,v},update.0.rank=4", "--add") == {
        "update.0.match": "layers.*.{q,v}",
        "update.0.rank": 4,
    }
    assert parse_assignments("a=[1, 2],b=x=y", "--add") == {"a": [1, 2], "b": "x=y"}
    for wrong in ("a", "=1", "a=1,a=2"):
        with pytest.raises(UserError, match="--add"):
            parse_assignments(wrong, "--add")
