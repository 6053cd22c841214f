"""Trials through the trainer that they share."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import yaml

from jaxtune.config import dump_config, load_config
from jaxtune.models import load_model
from jaxtune.models.decoder import split
from jaxtune.search.runner import Interrupted, run_all
from jaxtune.search.settings import Settings
from jaxtune.search.study import Study
from jaxtune.search.trainer_runner import TrainerRunner, _set_aside
from jaxtune.search.trial import Trial
from jaxtune.telemetry.writers import read_metrics
from jaxtune.training.hooks import Hooks
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.population import Population
from jaxtune.training.run import train
from jaxtune.training.run_directory import RunDirectory
from tests.kill_anywhere import timeless
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SEARCH = (
    "search={trials: 2, promote: 1, reference: paper, space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}}}"
)


OVERRIDES = {"train.seed": 1, "update.0.rank": 2, "update.0.dropout": 0.1, "optimizer.learning_rate": 0.03}


def losses(directory):
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_a_trial_is_the_run_of_its_own_configuration(config_file, tmp_path):
    """Whatever trial made the trainer: start and dropout of its own seed, columns of its own rank, and one program."""
    common = ["train.steps=3", "data.test=null"]
    runner = TrainerRunner(OpenedConfig(load_config(config_file, [SEARCH, *common])))
    jobs = [(Trial(0, {}, tmp_path / "0"), 1), (Trial(1, OVERRIDES, tmp_path / "1"), 3)]
    outcome = {trial.id: outcome for trial, outcome in run_all(runner, jobs)}[1]
    assert runner.compilations == 1
    changes = [f"{key}={value}" for key, value in OVERRIDES.items()]
    alone = train(load_config(config_file, [*common, *changes]))
    assert outcome.score == pytest.approx(alone["metrics"]["validation_loss"], rel=1e-5)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    assert losses(tmp_path / "0") != pytest.approx(losses(tmp_path / "1")[:1], rel=1e-5)


SOUND = [
    {"optimizer.learning_rate": rate, "update.0.rank": rank, "update.0.dropout": dropout, "train.seed": seed}
    for seed, (rate, rank, dropout) in enumerate(
        (rate, rank, dropout) for rate in (3e-3, 1e-2, 2e-2, 4e-2) for rank in (2, 4) for dropout in (0.0, 0.2)
    )
]


def scores(runner, directory, until):
    jobs = [(Trial(number, values, directory / f"{number:03d}"), until) for number, values in enumerate(SOUND)]
    ended = list(run_all(runner, jobs))
    assert sorted(trial.id for trial, _ in ended) == list(range(len(SOUND)))
    return np.array([outcome.score for _, outcome in sorted(ended, key=lambda item: item[0].id)])


@pytest.mark.slow
def test_sixteen_trials_rank_the_same_in_a_population(config_file, tmp_path, monkeypatch):
    """At sound rates losses agree to 1e-4 over the whole run, eight at a time in one program, also cut in two parts."""
    monkeypatch.setattr("jaxtune.search.slots.Population", functools.partial(Population, batched=True))
    opened = OpenedConfig(load_config(config_file, [SEARCH, "train.steps=6", "data.test=null"]))
    alone, together = TrainerRunner(opened), TrainerRunner(opened, population=8)
    one_by_one = scores(alone, tmp_path / "alone", 6)
    at_once = scores(together, tmp_path / "together", 3)
    at_once = scores(together, tmp_path / "together", 6)
    assert at_once == pytest.approx(one_by_one, rel=1e-4)
    assert np.argsort(at_once).tolist() == np.argsort(one_by_one).tolist()
    assert together.compilations == 1
    for number in range(len(SOUND)):
        paths = [losses(tmp_path / kind / f"{number:03d}") for kind in ("alone", "together")]
        assert paths[1] == pytest.approx(paths[0], rel=1e-4)


@pytest.mark.slow
def test_a_trial_that_diverges_or_stops_early_leaves_its_slot_to_the_next(config_file, tmp_path):
    """Eight trials of three lengths over three slots, one of them without end: the others end as they do alone."""
    settings = ["train.steps=6", "data.test=null", "train.evaluate_every=1"]
    opened = OpenedConfig(load_config(config_file, [SEARCH, *settings]))
    wild = {"optimizer.learning_rate": 0.5, "update.0.alpha": 1e38}
    values = [wild if number == 1 else SOUND[number] for number in range(8)]
    jobs = [(Trial(number, each, tmp_path / str(number)), 2 + 2 * (number % 3)) for number, each in enumerate(values)]
    runner = TrainerRunner(opened, population=3)
    ended = {trial.id: outcome for trial, outcome in run_all(runner, jobs)}
    assert sorted(ended) == list(range(8))
    assert ended[1].failed
    assert runner.compilations == 1
    lonely = TrainerRunner(opened)
    # Found at the end only, a divergence is no later.
    late = {**wild, "train.log_every": 50, "train.evaluate_every": 50}
    (_, outcome), *_ = run_all(lonely, [(Trial(1, late, tmp_path / "late"), 6)])
    assert (outcome.failed, outcome.steps_run) == (True, ended[1].steps_run)
    for number in (0, 2, 7):
        trial, until = jobs[number]
        alone = list(run_all(lonely, [(Trial(trial.id, trial.configuration, tmp_path / f"alone{number}"), until)]))
        assert ended[number].score == pytest.approx(alone[0][1].score, rel=1e-5)
        assert ended[number].steps_run == until


def test_a_stop_saves_every_trial_at_the_same_step(config_file, tmp_path):
    opened = OpenedConfig(load_config(config_file, [SEARCH, "train.steps=6", "data.test=null"]))
    jobs = [(Trial(number, SOUND[number], tmp_path / str(number)), 6) for number in range(3)]
    asked = itertools.count()
    # Asked at each of three starts, then before each step.
    stopped = TrainerRunner(opened, population=3, hooks=Hooks(should_stop=lambda: next(asked) >= 3 + 2))
    with pytest.raises(Interrupted):
        list(run_all(stopped, jobs))
    steps = [
        sorted(int(entry.name) for entry in (tmp_path / str(number) / "checkpoints").iterdir()) for number in range(3)
    ]
    assert steps == [[3]] * 3
    ended = {trial.id: outcome.score for trial, outcome in run_all(TrainerRunner(opened, population=3), jobs)}
    whole = [(Trial(number, SOUND[number], tmp_path / f"whole{number}"), 6) for number in range(3)]
    assert ended == {trial.id: o.score for trial, o in run_all(TrainerRunner(opened, population=3), whole)}


BATCHES = "search.space.train.batch_size={choice: [8, 16]}"


@pytest.mark.slow
def test_a_trial_s_numbers_do_not_depend_on_what_trained_before_it(config_file, tmp_path, monkeypatch):
    """Two programs share the places, in the form of accelerators: continued, scores are the same to the last bit."""
    monkeypatch.setattr("jaxtune.search.slots.Population", functools.partial(Population, batched=True))
    settings = [SEARCH, BATCHES, "train.steps=6", "data.test=null"]
    opened = OpenedConfig(load_config(config_file, settings))
    values = [
        {"train.batch_size": size, "optimizer.learning_rate": 0.01 + 0.003 * number}
        for number, size in enumerate((16, 16, 8, 16, 8, 16))
    ]

    def jobs(name):
        return [(Trial(n, one, tmp_path / name / str(n)), 3 + n % 3) for n, one in enumerate(values)]

    def ended(runner, left):
        found = {}
        with contextlib.suppress(Interrupted):
            found.update((trial.id, outcome.score) for trial, outcome in run_all(runner, left))
        return found

    stops = iter([])
    runner = TrainerRunner(opened, population=4, hooks=Hooks(should_stop=lambda: next(stops, False)))
    whole = ended(runner, jobs("whole"))
    assert sorted(whole) == list(range(6))
    # Asked at each of four starts, then before each step.
    stops = iter([*[False] * (4 + 4), True])
    before = ended(runner, jobs("cut"))
    assert 0 < len(before) < 6
    left = [job for job in jobs("cut") if job[0].id not in before]
    later = TrainerRunner(opened, population=4)
    assert before | ended(later, left) == whole
    assert (len(runner.trainers), runner.compilations, later.compilations) == (2, 2, 2)
    names = [[each.program(trial) for trial, _ in jobs("whole")] for each in (runner, later)]
    assert names[0] == names[1]
    assert [name == names[0][0] for name in names[0]] == [True, True, False, True, False, True]


def test_slots_follow_from_the_space_and_the_places(config_file):
    """Those of a program that trials of the space have, and of the reference's (16 rows), in either order."""
    paper = "search.reference=paper"
    opened = OpenedConfig(load_config(config_file, [SEARCH, paper]))
    for overrides, expected in (
        ((), (4, 1)),
        (("train.batch_size=16",), (4, 4)),
        (("search.space.train.batch_size={choice: [8, 32]}",), (2, 1)),
        (("search.space.train.batch_size={choice: [8, 16, 32]}",), (2, 2)),
        (
            ("search.space.train.batch_size={choice: [16, 32]}", "search.space.train.accumulate={choice: [1, 2]}"),
            (1, 1),
        ),
    ):
        opened.given = opened.config = load_config(config_file, [SEARCH, paper, *overrides])
        for order in (1, -1):
            runner = TrainerRunner(opened, population=4)
            made = [runner.trainer(runner.configuration(each)) for each in ({}, {"train.batch_size": 16})[::order]]
            assert tuple(runner.slots_of(trainer) for trainer in made[::order]) == expected, overrides


def test_trials_of_one_program_have_their_own_evaluations(config_file, tmp_path):
    """What the loop does between steps is the trial's own, whichever trial made the program."""
    opened = OpenedConfig(load_config(config_file, [SEARCH, "train.steps=6", "data.test=null"]))
    runner = TrainerRunner(opened, population=3)
    # So small a rate that no evaluation is better than the first.
    still = {"train.evaluate_every": 1, "train.patience": 1, "optimizer.learning_rate": 1e-30}
    values = [{}, {"train.evaluate_every": 2}, still]
    jobs = [(Trial(number, each, tmp_path / str(number)), 6) for number, each in enumerate(values)]
    ended = {trial.id: outcome for trial, outcome in run_all(runner, jobs)}
    assert runner.compilations == 1

    def evaluated(number):
        lines = read_metrics(tmp_path / str(number) / "metrics.jsonl")
        return [line["step"] for line in lines if "validation_loss" in line]

    assert [evaluated(number) for number in range(3)] == [[6], [2, 4, 6], [1, 2]]
    assert [ended[number].steps_run for number in range(3)] == [6, 6, 2]


def _trial(directory, config, step):
    (directory / "checkpoints" / str(step)).mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))


def test_a_trial_goes_on_from_its_own_files_only(tmp_path, config_file):
    one = load_config(config_file, ["optimizer.learning_rate=1e-3"])
    other = load_config(config_file, ["optimizer.learning_rate=2e-3"])
    home = tmp_path / "trials"
    directory = home / "000"
    home.mkdir()
    _set_aside(directory, one, 4)
    directory.mkdir()
    _set_aside(directory, one, 4)
    assert sorted(entry.name for entry in home.iterdir()) == ["000"]
    _trial(directory, one, 4)
    _set_aside(directory, one, 4)
    _set_aside(directory, one, 20)
    assert (directory / "checkpoints" / "4").is_dir()
    # Beyond the step that it is to be scored at, and another trial's: both would give a wrong score.
    _set_aside(directory, one, 3)
    assert not directory.exists()
    _trial(directory, other, 2)
    _set_aside(directory, one, 4)
    assert not directory.exists()
    assert {entry.name for entry in home.iterdir()} == {"000.1", "000.2"}
    assert (home / "000.1" / "checkpoints" / "4").is_dir(), "nothing is lost"
    directory.mkdir()
    (directory / "config.yaml").write_text("rate: 1")
    _set_aside(directory, one, 4)
    assert not directory.exists(), "what cannot be read is no trial of this study"


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (["search.promote=2"], True),
        (["search.trials=9", "search.fixed={optimizer.learning_rate: 1e-2}"], True),
        (["search.workers=2", "study.bootstrap=700", "name=other", "run_dir=elsewhere"], True),
        (["telemetry.tensorboard=true"], True),
        (["search.space.update.0.rank={power_of_two: [4, 64]}"], False),
        (["search.reference={update.0.rank: 32}"], False),
        (["train.seed=5"], False),
        (["data.completion=: {answer}"], False),
    ],
)
def test_what_decides_no_trial_does_not_make_it_another(tmp_path, config_file, overrides, same):
    """Also where a version of before wrote the files, which lacks a key."""
    directory = tmp_path / "000"
    _trial(directory, load_config(config_file, [SEARCH]), 2)
    file = directory / "config.yaml"
    written = yaml.safe_load(file.read_text())
    del written["kernels"], written["train"]["z_loss"], written["search"]["ladder"]
    file.write_text(yaml.safe_dump(written))
    _set_aside(directory, load_config(config_file, [SEARCH, *overrides]), 2)
    assert directory.exists() == same


def test_a_study_that_was_changed_goes_on_with_its_trials(config_file, tmp_path):
    """Promoted after the change, a trial trains on from its checkpoint: every step once, nothing moved aside."""
    settings = [SEARCH, "train.steps=4", "data.test=null"]
    trial = Trial(1, {"optimizer.learning_rate": 0.01}, tmp_path / "t[1]" / "001")
    list(run_all(TrainerRunner(OpenedConfig(load_config(config_file, settings))), [(trial, 2)]))
    changed = [*settings, "search.promote=2", "study.bootstrap=700", "name=other"]
    runner = TrainerRunner(OpenedConfig(load_config(config_file, changed)))
    (ended,) = run_all(runner, [(trial, 4)])
    assert [entry.name for entry in (tmp_path / "t[1]").iterdir()] == ["001"]
    assert [line["step"] for line in read_metrics(trial.directory / "metrics.jsonl")] == [1, 2, 3, 4]
    assert ended[1].steps_run == 4


def test_a_study_goes_on_from_its_journal_and_configuration_alone(config_file, tmp_path):
    """One trial finished and not tested, the other one under way: both are trained again, to the same scores."""
    own = SEARCH.replace("reference: paper, ", "")
    config = load_config(config_file, [own, "train.steps=5", f"run_dir={tmp_path / 'study'}"])
    runner, directory = TrainerRunner(OpenedConfig(config)), RunDirectory(tmp_path / "study", study=True)

    def run():
        directory.claim(config)
        study = Study(directory.path, Settings.of(config), runner, keep=runner.save_winner)
        return dict(study.run())

    whole = run()
    lines = directory.journal_path.read_text().splitlines(keepends=True)
    for entry in directory.path.iterdir():
        if entry not in (directory.journal_path, directory.config_path):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    before = [json.loads(line)["event"] for line in lines].index("promoted") + 1
    directory.journal_path.write_text("".join(lines[:before]))
    assert timeless(run()) == timeless(whole)
    ended = directory.journal_path.read_text().splitlines()
    assert timeless([json.loads(line) for line in ended]) == timeless([json.loads(line) for line in lines])
    assert directory.adapter_path.is_dir()


def test_a_winner_that_no_adapter_holds_is_left_as_a_whole_model(config_file, tmp_path):
    rules = "update=[{match: layers.*.mlp_norm, method: full}]"
    own = SEARCH.replace("reference: paper, ", "")
    config = load_config(config_file, [own, rules, "train.steps=2", "data.test=null", f"run_dir={tmp_path / 'study'}"])
    runner, trial = (
        TrainerRunner(OpenedConfig(config)),
        Trial(1, {"optimizer.learning_rate": 0.05}, tmp_path / "t" / "001"),
    )
    list(run_all(runner, [(trial, 2)]))
    path = tmp_path / "study" / "model"
    assert runner.save_winner(trial) == {"model": {"path": str(path), "trial": 1, "step": 2}}
    _, _, state = runner.load(trial)
    left = split(load_model(path, dtype="float32"))[1]["layers.mlp_norm.scale"]
    np.testing.assert_array_equal(left, state.trainable["full"]["layers.mlp_norm.scale"])


def test_what_is_measured_beside_the_objective_is_told(config_file, tmp_path):
    """Task metrics of a trial that is scored by its loss: those of the state that it ended in."""
    task = ["evaluation={task: extraction, max_new_tokens: 4}", "search.metrics=[exact_match]"]
    runner = TrainerRunner(OpenedConfig(load_config(config_file, [SEARCH, "train.steps=2", "data.test=null", *task])))
    trial = Trial(0, {}, tmp_path / "0")
    ((_, outcome),) = run_all(runner, [(trial, 2)])
    trainer, values, state = runner.load(trial)
    evaluator = runner.opened.evaluator("validation")
    answers = evaluator.evaluate(*trainer.apply(state, values))
    assert outcome.score == outcome.metrics["validation_loss"]
    assert {name: outcome.metrics[name] for name in answers.metrics} == answers.metrics
    assert outcome.standard_error == outcome.metrics["validation_loss_standard_error"]


def test_answers_of_a_population_score_each_trial_as_its_own_do(config_file, tmp_path, monkeypatch):
    """Trials of other ranks, scales and lengths, side by side in one program, answer as their own checkpoints do."""
    task = "evaluation={task: extraction, max_new_tokens: 3, batch_size: 32, stop: null}"
    settings = [SEARCH.replace("search={", "search={objective: f1, "), "train.steps=6", "data.test=null", task]
    opened = OpenedConfig(load_config(config_file, [*settings, "train.evaluate_every=2"]))
    runner = TrainerRunner(opened, population=3)
    evaluator = runner._evaluators["validation"]
    assert evaluator.filled == 12 / 32, "full batches take less time one after another on a CPU"
    scored, side_by_side = [], type(evaluator).evaluate_side_by_side

    def kept(self, params, adapters, states):
        scored.append(side_by_side(self, params, adapters, states))
        return scored[-1]

    monkeypatch.setattr(type(evaluator), "evaluate_side_by_side", kept)
    values = [{**SOUND[number], "optimizer.learning_rate": 0.2} for number in (0, 1, 14, 15)]
    jobs = [(Trial(number, each, tmp_path / str(number)), 4 + number % 2) for number, each in enumerate(values)]
    ended = {trial.id: outcome for trial, outcome in run_all(runner, jobs)}
    assert [len(results) for results in scored] == [3, 3, 1, 1, 1, 1]
    assert opened.generator.compilations == 1
    last = {0: scored[1][0], 1: scored[2][0], 2: scored[1][2], 3: scored[5][0]}
    assert len({str(result.records) for result in last.values()}) == 4, "all answer alike: nothing is compared"
    for trial, _ in jobs:
        trainer, own, state = runner.load(trial)
        alone = evaluator.evaluate(*trainer.apply(state, own))
        assert last[trial.id].records == alone.records
        assert ended[trial.id].metrics.items() >= alone.metrics.items()
        assert ended[trial.id].standard_error == alone.standard_errors.get("f1")
