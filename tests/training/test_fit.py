"""The loop: what it logs, evaluates, saves, and why it stops."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.training_sections import KeepConfig
from jaxtune.telemetry.throughput import Throughput
from jaxtune.telemetry.writers import JsonlWriter, read_metrics
from jaxtune.training import fit as fitting
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.fit import Run
from jaxtune.training.run_options import RunOptions
from jaxtune.training.save_schedule import SaveSchedule


class Record:
    """A writer and a listener that keep what they are told."""

    def __init__(self):
        self.lines, self.told, self.ranges, self.ended = [], [], [], 0

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def close(self):
        pass

    def on_start(self, step, total):
        self.ranges.append((step, total))

    def on_metrics(self, step, metrics):
        self.told.append((step, dict(metrics)))

    def on_end(self):
        self.ended += 1

    def steps(self, name):
        """The steps of the lines that have a metric."""
        return [step for step, metrics in self.lines if name in metrics]


def fit(trainer, batches, **given):
    """The options of a run are given beside the others."""
    names = {field.name for field in dataclasses.fields(RunOptions)}
    options = RunOptions(**{name: value for name, value in given.items() if name in names})
    return fitting.fit(trainer, batches, options, **{n: value for n, value in given.items() if n not in names})


def losses(record):
    return {step: metrics["loss"] for step, metrics in record.lines if "loss" in metrics}


def scripted(scores):
    """Evaluations that give these validation losses, one after the other."""
    left = iter(scores)
    return lambda state: {"validation_loss": next(left)}


def breaking(trainer, at, name="loss"):
    """The trainer with one metric not a number from step ``at`` on, and the state spoilt as it would be."""
    whole = trainer.step

    def step(state, batch, hyperparameters=None):
        state, metrics = whole(state, batch, hyperparameters)
        if int(state.step) < at:
            return state, metrics
        spoilt = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.trainable)
        return type(state)(state.step, spoilt, state.moments, state.seed), {**metrics, name: jnp.float32(jnp.inf)}

    trainer.step = step
    return trainer


def kill(run, trainer, after, each=lambda: None):
    """Trains a run for some steps, with ``each`` called after every one, and goes no further."""
    state = run.start()
    loop = run.loop()
    batch = next(loop)
    for _ in range(after):
        state, metrics = trainer.step(state, batch)
        each()
        batch = loop.send((functools.partial(lambda state: state, state), metrics))
    loop.close()
    run.checkpoints.close()


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints")
    yield opened
    opened.close()


@pytest.mark.parametrize(("log_every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6, 8]), (20, [8])])
def test_each_logged_step_once_and_the_last_always(variant, batches, validation, log_every, expected):
    record = Record()
    result = fit(
        variant(log_every=log_every, evaluate_every=2),
        batches(),
        validation=validation,
        writer=record,
        listener=record,
    )
    assert record.steps("loss") == expected
    assert record.steps("validation_loss") == [2, 4, 6, 8]
    # One line a step, training and evaluation together, and steps never go back.
    assert [step for step, _ in record.lines] == sorted({*expected, 2, 4, 6, 8})
    # People are told of a step before its evaluation, which may take a while.
    told: dict[int, dict[str, float]] = {}
    for step, metrics in record.told:
        assert not told.get(step, {}).keys() & metrics.keys()
        told[step] = {**told.get(step, {}), **metrics}
    assert list(told.items()) == record.lines
    assert (record.ranges, record.ended) == ([(0, 8)], 1)
    assert (result.stopped, result.step, result.steps_run, result.examples) == ("finished", 8, 8, 8 * 4)
    assert int(result.state.step) == 8
    assert record.lines[-1] == (8, {**result.metrics, **result.evaluation})
    assert {"loss", "learning_rate", "grad_norm", "tokens", "weight", "tokens_per_second"} <= result.metrics.keys()


def test_the_logged_numbers_are_those_of_the_steps_taken_by_hand(trainer, variant, batches):
    record = Record()
    fit(variant(), batches(), writer=record)
    state, data = trainer.init(), batches()
    for step in range(1, 9):
        batch = next(data)
        state, metrics = trainer.step(state, batch)
        logged = dict(record.lines)[step]
        assert logged["loss"] == float(metrics["loss"])
        assert logged["tokens"] == np.count_nonzero(batch["segment_ids"]) == 4 * 8
        assert logged["weight"] == pytest.approx(batch["weights"].sum())


@pytest.mark.parametrize("log_every", [2, 4])
def test_tokens_per_second_counts_no_padding_and_no_evaluation(variant, batches, validation, log_every):
    """A clock that only steps and evaluations move: a step takes a second, an evaluation a hundred."""

    now = 0.0
    trainer = variant(log_every=log_every, evaluate_every=2)
    step, evaluate = trainer.step, trainer.evaluate

    def timed_step(*arguments):
        nonlocal now
        now += 1.0
        return step(*arguments)

    def timed_evaluate(*arguments):
        nonlocal now
        now += 100.0
        return evaluate(*arguments)

    trainer.step, trainer.evaluate = timed_step, timed_evaluate
    trainer.throughput = lambda hyperparameters=None: Throughput(1e6, 4e6, clock=lambda: now)
    record = Record()
    fit(trainer, batches(), validation=validation, writer=record)
    lines = [metrics for _, metrics in record.lines if "loss" in metrics]
    # Four rows of twelve positions, of which each example takes eight.
    assert [metrics["tokens_per_second"] for metrics in lines] == pytest.approx([32.0] * (8 // log_every))
    assert [metrics["mfu"] for metrics in lines] == pytest.approx([0.25] * (8 // log_every))


def test_until_pauses_and_the_schedule_stays_that_of_the_whole_run(variant, batches, checkpoints, tmp_path):
    whole, parts = Record(), Record()
    fit(variant(), batches(), writer=whole)
    first = fit(variant(), batches(), writer=parts, checkpoints=checkpoints, until=3)
    assert (first.stopped, first.step) == ("paused", 3)
    second = fit(variant(), batches(), writer=parts, checkpoints=checkpoints, until=99)
    assert (second.stopped, second.step, second.steps_run) == ("finished", 8, 5)
    assert losses(parts) == losses(whole)
    rates = {step: metrics["learning_rate"] for step, metrics in whole.lines}
    assert rates == {step: metrics["learning_rate"] for step, metrics in parts.lines}
    # The newest checkpoint is the end: nothing is left to do, and nothing is logged again.
    again = fit(variant(), batches(), writer=parts, checkpoints=checkpoints)
    assert (again.stopped, again.steps_run, len(parts.lines)) == ("finished", 0, 8)


def test_a_pause_is_evaluated_once(variant, batches, validation, checkpoints):
    record = Record()
    options = {"validation": validation, "writer": record, "checkpoints": checkpoints, "until": 3}
    first = fit(variant(), batches(), **options)
    second = fit(variant(), batches(), **options)
    assert record.steps("validation_loss") == [3]
    assert second.evaluation == first.evaluation
    assert checkpoints.best_step == 3


def test_patience_counts_evaluations_without_improvement(variant, batches, checkpoints):
    trainer = variant(evaluate_every=1, patience=2)
    scores = [3.0, 2.0, 2.5, math.nan, 1.0, 1.0, 1.0, 1.0]
    result = fit(trainer, batches(), evaluate=scripted(scores), checkpoints=checkpoints)
    assert (result.stopped, result.step) == ("patience", 4)
    assert (checkpoints.latest_step, checkpoints.best_step) == (4, 2)
    # Started once more, as after a kill between the last checkpoint and the summary: it is still out of patience.
    again = fit(trainer, batches(), evaluate=scripted([0.0]), checkpoints=checkpoints)
    assert (again.stopped, again.step, again.steps_run) == ("patience", 4, 0)


def test_a_run_that_is_taken_further_follows_the_longer_schedule_with_patience_anew(variant, batches, checkpoints):
    trainer = variant(evaluate_every=1, patience=2, steps=4)
    result = fit(trainer, batches(), evaluate=scripted([1.0, 2.0, 3.0]), checkpoints=checkpoints)
    assert (result.stopped, result.step, result.planned) == ("patience", 3, ((0, 4),))
    longer, record = variant(evaluate_every=1, patience=2, steps=10), Record()
    further = fit(longer, batches(), evaluate=scripted([2.0, 3.0]), checkpoints=checkpoints, writer=record)
    assert (further.stopped, further.step, further.planned) == ("patience", 5, ((0, 4), (3, 10)))
    rates = {step: metrics["learning_rate"] for step, metrics in record.lines}
    peak, warmup = trainer.hyperparameters["optimizer.learning_rate"], 10 * trainer.hyperparameters["optimizer.warmup"]
    for step in (4, 5):
        # Half a cosine over the longer length, from the end of its warm-up on.
        expected = peak * (1 + math.cos(math.pi * (step - 1 - warmup) / (10 - warmup))) / 2
        assert rates[step] == pytest.approx(expected, rel=1e-6)
    again = fit(longer, batches(), evaluate=scripted([]), checkpoints=checkpoints)
    assert (again.stopped, again.steps_run, again.planned) == ("patience", 0, further.planned)


def test_taken_further_state_and_data_go_on_under_the_longer_schedule(variant, batches, checkpoints):
    fit(variant(steps=3), batches(), checkpoints=checkpoints)
    result = fit(variant(steps=6), batches(), checkpoints=checkpoints)
    by_hand = batches()
    trainer = variant(steps=6)
    state = trainer.init()
    for step in range(6):
        state, _ = trainer.step(state, next(by_hand), {"train.steps": 3.0 if step < 3 else 6.0})
    for one, other in zip(jax.tree.leaves(result.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_improvement_starts_patience_anew_and_it_survives_a_resume(variant, batches, checkpoints):
    trainer = variant(evaluate_every=1, patience=2)
    first = fit(trainer, batches(), evaluate=scripted([3.0, 3.5, 2.0, 2.1]), checkpoints=checkpoints, until=4)
    assert first.stopped == "paused"
    result = fit(trainer, batches(), evaluate=scripted([2.2, 0.0]), checkpoints=checkpoints)
    assert (result.stopped, result.step) == ("patience", 5)


@pytest.mark.parametrize("pauses", [(1,), (3,), (5, 7), (2, 4), (6,)])
@pytest.mark.parametrize("scores", [(3.0, 2.5, 2.4), (2.0, 2.5, 2.4)])
def test_where_a_run_pauses_does_not_count_for_patience(variant, batches, tmp_path, scores, pauses):
    """A run that is scored on the way ends where it ends without, however good or bad it is there."""
    trainer = variant(evaluate_every=2, patience=2)
    of_step = dict(zip((2, 4, 6), scores, strict=True))

    def run(name, *stops):
        ends = []
        for until in (*stops, None):
            opened = Checkpoints(tmp_path / name)
            result = fit(
                trainer,
                batches(),
                evaluate=lambda state: {"validation_loss": of_step.get(int(state.step), 0.0)},
                checkpoints=opened,
                until=until,
            )
            opened.close()
            ends.append((result.stopped, result.step))
        return ends

    (alone,) = run("alone")
    assert alone == (("finished", 8) if scores[1] < scores[0] else ("patience", 6))
    *paused, end = run("paused", *pauses)
    assert end == alone
    assert paused == [alone if until > alone[1] else ("paused", until) for until in pauses]


def test_the_last_and_the_best_checkpoint_are_kept(variant, batches, checkpoints, tmp_path):
    trainer, kept = variant(evaluate_every=2), {}
    original = trainer.step

    def step(state, batch, hyperparameters=None):
        state, metrics = original(state, batch, hyperparameters)
        kept[int(state.step)] = jax.tree.map(np.array, state.trainable)
        return state, metrics

    trainer.step = step
    result = fit(trainer, batches(), evaluate=scripted([3.0, 1.0, 2.0, 4.0]), checkpoints=checkpoints)
    assert (checkpoints.best_step, checkpoints.latest_step) == (4, 8)
    assert sorted(int(item.name) for item in (tmp_path / "checkpoints").iterdir()) == [4, 6, 8]
    for number in (4, 8):
        state, _ = checkpoints.restore(number, result.state)
        jax.tree.map(np.testing.assert_array_equal, state.trainable, kept[number])


def test_without_a_final_evaluation_the_end_has_no_score(variant, batches, checkpoints):
    trainer = variant(evaluate_every=3)
    # Had step 8 the score of step 6, it would be the best as well as the last, and 6 would be gone.
    fit(trainer, batches(), evaluate=scripted([2.0, 1.0]), checkpoints=checkpoints, evaluate_at_end=False)
    assert (checkpoints.best_step, checkpoints.latest_step) == (6, 8)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("log_every", [1, 100])
def test_divergence_leaves_the_last_good_checkpoint(variant, batches, checkpoints, log_every, name):
    trainer = breaking(variant(log_every=log_every, checkpoint_every=1), at=4, name=name)
    record = Record()
    result = fit(trainer, batches(), writer=record, checkpoints=checkpoints)
    assert (result.stopped, result.step, result.steps_run) == ("diverged", 4, 4)
    assert checkpoints.latest_step == 3
    state, _ = checkpoints.restore(3, trainer.init())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))


NOTICED = {
    "logged": {"log_every": 1},
    "logged later": {"log_every": 6},
    "at the end": {},
    "evaluated": {"evaluate_every": 4},
    "evaluated later": {"evaluate_every": 6},
    "saved later": {"checkpoint_every": 7},
}


@pytest.mark.parametrize("how", NOTICED)
def test_a_divergence_is_the_first_step_that_is_not_finite_however_it_is_noticed(
    variant, batches, validation, checkpoints, how
):
    trainer = breaking(variant(**{"log_every": 100, **NOTICED[how]}), at=4)
    record = Record()
    result = fit(trainer, batches(), writer=record, listener=record, checkpoints=checkpoints, validation=validation)
    assert (result.stopped, result.step, result.steps_run, result.evaluation) == ("diverged", 4, 4, {})
    assert record.steps("loss") == ([1, 2, 3, 4] if how == "logged" else [4])
    assert record.lines == record.told
    assert record.lines[-1] == (4, result.metrics)
    assert math.isinf(result.metrics["loss"])
    assert (result.examples_per_step, checkpoints.latest_step) == (4, None)


def told(result):
    """A result without times, and without what this call alone did."""
    metrics = {name: value for name, value in result.metrics.items() if not name.endswith("_per_second")}
    return (result.step, result.stopped, result.examples_per_step, metrics, dict(result.evaluation))


@pytest.mark.parametrize(
    "settings", [{"checkpoint_every": 1}, {"checkpoint_every": 4, "evaluate_every": 3, "log_every": 100}]
)
@pytest.mark.parametrize(("after", "at"), [(8, 99), (5, 99), (5, 6)])
def test_a_killed_run_tells_what_it_would_have_told_undisturbed(
    variant, batches, validation, tmp_path, settings, after, at
):
    """Of the steps before it was killed as well, and where it diverges later."""
    trainer = breaking(variant(**settings), at)

    def go(name):
        checkpoints = Checkpoints(tmp_path / name)
        result = fit(trainer, batches(), validation=validation, checkpoints=checkpoints)
        checkpoints.close()
        return result

    whole = go("whole")
    assert {"loss", "grad_norm"} <= whole.metrics.keys()
    if after == 8:  # behind the last checkpoint, before its process could tell
        assert told(go("whole")) == told(whole)
        return
    options = RunOptions(validation=validation, checkpoints=Checkpoints(tmp_path / "killed"))
    kill(Run(trainer, batches(), options), trainer, after)
    again = go("killed")
    assert told(again) == told(whole)
    assert again.steps_run < whole.steps_run


def test_divergence_in_the_last_step_is_neither_saved_nor_evaluated(variant, batches, checkpoints, validation):
    trainer = breaking(variant(checkpoint_every=5), at=8)
    record = Record()
    result = fit(trainer, batches(), writer=record, checkpoints=checkpoints, validation=validation)
    assert (result.stopped, result.step, result.evaluation) == ("diverged", 8, {})
    assert math.isinf(dict(record.lines)[8]["loss"])
    assert checkpoints.latest_step == 5


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_stop_saves_at_once_and_the_run_goes_on_as_if_never_stopped(variant, batches, checkpoints, log_every):
    whole, parts = Record(), Record()
    fit(variant(log_every=log_every), batches(), writer=whole)
    asked = iter([False, False, True])
    first = fit(
        variant(log_every=log_every), batches(), writer=parts, checkpoints=checkpoints, should_stop=lambda: next(asked)
    )
    assert (first.stopped, first.step, checkpoints.latest_step) == ("signal", 3, 3)
    second = fit(variant(log_every=log_every), batches(), writer=parts, checkpoints=checkpoints)
    assert (second.stopped, second.steps_run) == ("finished", 5)
    assert losses(parts) == losses(whole)


def test_a_stop_at_the_last_step_ends_the_run_in_full(variant, batches, checkpoints, validation):
    taken = 0
    trainer = variant()
    step = trainer.step

    def counted(*arguments):
        nonlocal taken
        taken += 1
        return step(*arguments)

    trainer.step = counted
    result = fit(trainer, batches(), checkpoints=checkpoints, validation=validation, should_stop=lambda: taken == 8)
    assert result.stopped == "finished"
    assert "validation_loss" in result.evaluation
    assert (checkpoints.latest_step, checkpoints.best_step) == (8, 8)


def test_a_checkpoint_s_record_is_plain_json(variant, batches, checkpoints):
    trainer = variant(checkpoint_every=3)
    fit(trainer, batches(), checkpoints=checkpoints, until=4)
    _, loop = checkpoints.restore(4, trainer.init())
    assert json.loads(json.dumps(loop)) == loop
    assert (loop["best"], loop["misses"], loop["evaluation"]) == (None, 0, {})


def test_a_failing_source_stops_the_loop_with_its_error(variant, batches):
    class Failing:
        def __init__(self, whole):
            self.whole, self.left = whole, 3

        def __next__(self):
            if not self.left:
                raise OSError("the disk is gone")
            self.left -= 1
            return next(self.whole)

        def get_state(self):
            return self.whole.get_state()

        def set_state(self, state):
            self.whole.set_state(state)

    record = Record()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(variant(), Failing(batches()), writer=record)
    # What was trained until then is logged but for the step under way.
    assert record.steps("loss")[:2] == [1, 2]


def test_the_step_can_be_one_s_own(variant, batches):
    """Research code: a step that keeps an average of the parameters, around the compiled one."""
    trainer = variant()
    average = None
    whole = trainer.step

    def step(state, batch, hyperparameters=None):
        nonlocal average
        state, metrics = whole(state, batch, hyperparameters)
        host = jax.tree.map(np.array, state.trainable)
        average = host if average is None else jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, average, host)
        return state, {**metrics, "distance": jnp.float32(7.0)}

    trainer.step = step
    record = Record()
    result = trainer.fit(batches(), writer=record)
    assert record.steps("distance") == list(range(1, 9))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), average, result.state.trainable)
    assert not any(jax.tree.leaves(same))


def test_a_run_with_only_its_steps_set_goes_on_from_a_checkpoint_by_time(variant, batches, tmp_path, caplog):
    """A clock that only steps move: each takes a minute; killed after the seventh."""
    trainer, checkpoints, now = variant(checkpoint_minutes=3.0), Checkpoints(tmp_path / "checkpoints"), 0.0
    whole = fit(trainer, batches())
    run = Run(trainer, batches(), RunOptions(checkpoints=checkpoints, writer=(record := Record())))
    run.saves = SaveSchedule(trainer.config, clock=lambda: now)

    def minute():
        nonlocal now
        now += 60.0

    kill(run, trainer, 7, minute)
    assert [step for step, _ in record.lines] == [1, 2, 3, 4, 5, 6]
    assert {item.name for item in (tmp_path / "checkpoints").iterdir()} == {"3", "6"}

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with caplog.at_level("INFO", "jaxtune"):
        ended = fit(trainer, batches(), checkpoints=checkpoints)
    checkpoints.close()
    assert caplog.messages == [
        f"going on from step 6 of 8, saved by train.checkpoint_minutes ({tmp_path / 'checkpoints' / '6'})"
    ]
    assert (ended.steps_run, ended.step) == (2, 8)
    jax.tree.map(np.testing.assert_array_equal, ended.state, whole.state)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_one_that_was_not(variant, batches, tmp_path):
    trainer = variant(checkpoint_every=2, keep=KeepConfig(latest=3))
    folder = tmp_path / "checkpoints"

    def train(until=None):
        checkpoints = Checkpoints(folder, keep=trainer.config.keep)
        writer = JsonlWriter(tmp_path / "metrics.jsonl", checkpoints.latest_step or 0)
        result = fit(trainer, batches(), until=until, checkpoints=checkpoints, writer=writer)
        writer.close()
        checkpoints.close()
        return result, [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")]

    train(6)
    (folder / "6" / "state" / "manifest.ocdbt").unlink()
    (folder / "4" / "loop" / "metadata").unlink()
    result, logged = train()
    assert (result.steps_run, result.stopped) == (6, "finished")
    assert [step for step, _ in logged] == list(range(1, 9))
    assert {"4.damaged", "6.damaged"} < {item.name for item in folder.iterdir()}
    whole = Record()
    fit(trainer, batches(), writer=whole)
    assert logged == list(losses(whole).items())
