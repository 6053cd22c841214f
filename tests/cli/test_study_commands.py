"""Living with a study through the command: status, list, show, extend, stop, and a journal that somebody edited."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from jaxtune.cli import main
from jaxtune.cli.study.show import sparkline
from jaxtune.config import dump_config, load_config
from jaxtune.search.journal import Journal
from jaxtune.search.run import make_study
from jaxtune.training.run_directory import RunDirectory

sys.path.insert(0, str(Path(__file__).parent.parent / "search"))
from synthetic import SyntheticRunner, interrupt_at

SEARCH = (
    "search={trials: 4, promote: 1, initial: 4, space: {optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}, "
    "update.0.rank: {power_of_two: [2, 64]}}}"
)


@pytest.fixture
def run_dir(config_file, tmp_path):
    """A study of made-up scores that was stopped in its last early trial."""
    config = load_config(config_file, [SEARCH])
    RunDirectory(config.directory, study=True).claim(config)
    runner = SyntheticRunner(divergence=1.0)
    runner.before = interrupt_at(3, 10)
    assert make_study(config, runner).run() is None
    return tmp_path / "run"


@pytest.fixture
def ask(capsys):
    """Runs a command and returns its exit code, standard output and standard error."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return run


def test_status_and_list_tell_where_it_stands(run_dir, ask):
    code, text, _ = ask("study", "status", run_dir)
    assert code == 0
    assert "4 of 4 trials proposed: 1 waiting, 3 scored; the best 1 go to the end" in text
    again = re.escape(f"to go on: jaxtune search {run_dir}/config.yaml")
    assert re.search(rf"nobody runs it; the last record is \d+ s old; {again}$", text, re.MULTILINE)
    status = json.loads(ask("study", "status", run_dir, "--json")[1])
    assert (status["phase"], status["running"], status["scored"], status["waiting"]) == ("scoring", None, 3, 1)
    with Journal(run_dir):
        _, text, _ = ask("study", "status", run_dir)
        assert f"run by process {os.getpid()} on" in text
        assert re.search(r"\(\d s ago\)", text)
        assert f"process {os.getpid()}" in ask("study", "list", run_dir.parent)[1]
    (run_dir.parent / "other").mkdir()
    (run_dir.parent / "other" / "trials.jsonl").write_text('{"event": "proposed"}\n')
    code, text, errors = ask("study", "list", run_dir.parent, "--json")
    assert code == 0
    listed = json.loads(text)
    assert [study["run_dir"] for study in listed["studies"]] == [str(run_dir)]
    assert list(listed["damaged"]) == [str(run_dir.parent / "other")]
    assert "line 1: the first record is 'proposed'" in errors
    assert "no study below" in ask("study", "list", run_dir / "trials")[1]


def test_studies_are_listed_by_their_whole_names(run_dir, ask):
    names = [run_dir.parent / name for name in ("exp[red]", "exp[v2]")]
    for name in names:
        shutil.copytree(run_dir, name)
    _, text, _ = ask("study", "list", run_dir.parent)
    # A name that is too long for its column goes on in the next line.
    firsts = "".join(line.split("  ")[0].strip() for line in text.splitlines())
    assert all(str(name) in firsts for name in names), text


def test_show_tells_one_trial(run_dir, ask):
    lines = [json.dumps({"step": step, "loss": 5 - step / 4}) for step in range(1, 11)]
    (run_dir / "trials" / "001" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    code, text, _ = ask("study", "show", run_dir, 1)
    assert code == 0
    assert "trial 1: scored, proposed by design" in text
    assert "training loss, steps 1 to 10, between 2.5 and 4.75" in text
    assert "4.75 █▇▆▆▅▄▃▃▂▁ 2.5" in text
    details = json.loads(ask("study", "show", run_dir, 1, "--json")[1])
    assert f"again, by itself: {details['command']}" in text
    assert f"optimizer.learning_rate={details['configuration']['optimizer.learning_rate']}" in details["command"]
    code, _, errors = ask("study", "show", run_dir, 7)
    assert code == 2
    assert "has trials 0 to 3" in errors


def test_curves_for_people():
    assert sparkline([]) == ""
    assert sparkline([1.0, None, 1.0]) == "▁×▁"
    assert sparkline([None]) == "×"
    assert sparkline([float(value) for value in range(120)]) == sparkline([float(value) for value in range(1, 120, 2)])
    assert len(sparkline([0.0] * 61)) == 60


def test_extend_from_the_command_line(run_dir, ask):
    journal = run_dir / "trials.jsonl"
    arguments = ("study", "extend", run_dir, "search.trials=6", "--fix", "update.0.rank=8", "--json")
    before = journal.read_bytes()
    code, text, _ = ask(*arguments, "--dry-run")
    assert (code, journal.read_bytes()) == (0, before)
    assert json.loads(text)["written"] is False
    code, text, _ = ask(*arguments, "--no-run")
    assert code == 0
    assert json.loads(text) == {
        "run_dir": str(run_dir),
        "changed": {"trials": 6, "fixed": {"update.0.rank": 8}},
        "added": {},
        "to_score": 3,
        "written": True,
    }
    config = load_config(run_dir / "config.yaml")
    assert config.search is not None
    assert (config.search.trials, config.search.fixed) == (6, {"update.0.rank": 8})
    assert "update.0.rank fixed at 8" in ask("study", "status", run_dir)[1]
    for wrong, part in (("--fix", "update.0.rank"), ("--add", "update.0.rank=5"), ("--free", "optimizer.warmup")):
        code, _, errors = ask("study", "extend", run_dir, wrong, part, "--no-run")
        assert code == 2
        assert wrong in errors


def test_the_file_that_it_was_started_with_says_how_it_goes_on(run_dir, ask, config_file):
    ask("study", "extend", run_dir, "search.trials=6", "--no-run")
    code, _, errors = ask("search", config_file, SEARCH)
    assert code == 2
    assert "search.trials: there 6, now 4" in errors
    assert f"to go on with it as it is: jaxtune search {run_dir}/config.yaml" in errors


def test_going_on_tells_where_the_study_stands(run_dir, ask, config_file, tmp_path, monkeypatch):
    def stopped(config, *, on_plan, **_):
        on_plan([{"rule": "update.0"}])

    monkeypatch.setattr("jaxtune.search.run.search", stopped)
    code, _, errors = ask("search", run_dir / "config.yaml")
    assert code == 0
    assert f"going on with the study in {run_dir}: 4 of 4 trials proposed: 1 waiting, 3 scored\n" in errors
    code, _, errors = ask("search", config_file, SEARCH, f"run_dir={tmp_path / 'new'}")
    assert code == 0
    assert "to watch it" in errors
    assert "going on" not in errors


def test_a_second_process_is_told_who_runs_it(run_dir, ask, config_file):
    before = (run_dir / "trials.jsonl").read_bytes()
    with Journal(run_dir):
        for arguments in (("search", config_file, SEARCH), ("study", "extend", run_dir, "search.trials=6")):
            code, _, errors = ask(*arguments)
            assert code == 2
            assert f"is being run by process {os.getpid()} on" in errors
            assert f"jaxtune study stop {run_dir}" in errors
        # A report reads what is there, whoever writes it.
        assert ask("report", run_dir)[0] == 0
    assert (run_dir / "trials.jsonl").read_bytes() == before


def test_stop_where_nobody_runs(run_dir, ask):
    code, text, _ = ask("study", "stop", run_dir)
    assert code == 0
    assert f"nobody runs {run_dir}; to go on: jaxtune search {run_dir}/config.yaml" in text
    assert ask("study", "stop", run_dir, "--timeout", "-1")[0] == 2
    assert ask("study", "stop", run_dir / "trials")[0] == 2


def _edited(lines, event, trial, change):
    """The lines with one record changed, and its number."""
    for number, line in enumerate(lines, start=1):
        record = json.loads(line)
        if (record["event"], record.get("trial")) == (event, trial):
            change(record)
            return [*lines[: number - 1], json.dumps(record), *lines[number:]], number
    raise AssertionError("no such record")


def _rename(record):
    record["configuration"]["update.0.rnak"] = record["configuration"].pop("update.0.rank")


@pytest.mark.parametrize(
    ("event", "change", "parts"),
    [
        ("proposed", _rename, ["trial 2 sets 'update.0.rnak', which is not searched; did you mean 'update.0.rank'"]),
        ("proposed", lambda record: record["configuration"].pop("update.0.rank"), ["does not set update.0.rank"]),
        ("proposed", lambda record: record["configuration"].update({"update.0.rank": 5}), ["= 5", "power_of_two"]),
        ("proposed", lambda record: record.update(trial=1), ["trial 1 was proposed before, in line 4"]),
        ("proposed", lambda record: record.update(configuration="none"), ["no mapping"]),
        (
            "scored",
            lambda record: record["configuration"].update({"update.0.rank": 2}),
            ["differs from what line", "update.0.rank is"],
        ),
        ("scored", lambda record: record.update(score="good"), ["'good' is no number"]),
        ("scored", lambda record: record.update(event="scroed"), ["unknown event 'scroed'"]),
    ],
)
def test_an_edited_journal_is_refused_by_line(run_dir, ask, event, change, parts):
    journal = run_dir / "trials.jsonl"
    lines, number = _edited(journal.read_text().splitlines(), event, 2, change)
    journal.write_text("\n".join(lines) + "\n")
    before = journal.read_bytes()
    code, _, errors = ask("study", "extend", run_dir, "search.trials=6", "--no-run")
    assert code == 2
    assert f"trials.jsonl, line {number}: " in errors
    assert all(part in errors for part in parts), errors
    assert journal.read_bytes() == before


def test_a_journal_cut_off_in_a_line_is_recovered_and_told(run_dir, ask, caplog):
    journal = run_dir / "trials.jsonl"
    whole = journal.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    journal.write_bytes(whole[: last + 25])
    assert ask("study", "status", run_dir)[0] == 0, "a reader leaves the torn line alone"
    assert journal.read_bytes() == whole[: last + 25]
    code, text, _ = ask("study", "extend", run_dir, "--no-run")
    assert code == 0
    assert "the last line is incomplete" in caplog.text
    assert journal.read_bytes() == whole[:last]
    assert "nothing changes" in text


def test_the_journal_of_another_space_is_refused(run_dir, ask, config_file):
    wider = SEARCH.replace("[1e-5, 1e-2]", "[1e-5, 1e-1]")
    code, _, errors = ask("search", config_file, wider)
    assert code == 2
    assert "search.space" in errors
    # Where config.yaml was edited as well, the journal still knows.
    config = load_config(config_file, [wider])
    (run_dir / "config.yaml").write_text(dump_config(config))
    before = (run_dir / "trials.jsonl").read_bytes()
    for arguments in (("search", config_file, wider), ("study", "extend", run_dir, "search.trials=6")):
        code, _, errors = ask(*arguments)
        assert code == 2
        assert "journal of another study: search.space.optimizer.learning_rate.log_uniform.1 is 0.01 there" in errors
    assert (run_dir / "trials.jsonl").read_bytes() == before
