"""A trial in a population is the trial alone, step by step; and exactly the same whatever its neighbours do."""

from __future__ import annotations

import copy
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.training_sections import TrainConfig
from jaxtune.models import DecoderConfig, random_model
from jaxtune.parallel import make_mesh
from jaxtune.training import Trainer
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.population import Population
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.low_rank import LowRankRule

SIZE = 4
SOUND = {"optimizer.learning_rate": 1e-3}
HYPERPARAMETERS = st.fixed_dictionaries(
    {
        "optimizer.learning_rate": st.floats(1e-5, 3e-1),
        "optimizer.warmup": st.floats(0, 1, exclude_max=True),
        "optimizer.weight_decay": st.floats(0, 0.5),
        "optimizer.beta1": st.floats(0, 0.99),
        "optimizer.beta2": st.floats(0.5, 0.9999),
        "optimizer.clip_norm": st.floats(1e-3, 10),
        "train.steps": st.integers(4, 50).map(float),
        "train.label_smoothing": st.floats(0, 0.5),
        "update.0.rank": st.integers(1, 8).map(float),
        "update.0.alpha": st.floats(0.5, 64),
        "update.0.dropout": st.floats(0, 0.9),
    }
)


@pytest.fixture(scope="module")
def trainer(model):
    """A program with ranks up to 8 and dropout in it."""
    return Trainer(
        model,
        UpdatePlan([LowRankRule(match="layers.*.attention.{q,v}", rank=4, alpha=8.0)]),
        TrainConfig(steps=20, batch_size=4, sequence_length=12),
        OptimizerConfig(learning_rate=1e-2),
        capacity={"update.0.rank": 8},
        dropout=True,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["batched", "in turn"])
def population(trainer, request):
    """One population of each kind for all tests of this module: what it holds is replaced, its program stays."""
    return Population(trainer, SIZE, batched=request.param)


@pytest.fixture
def streams(batches):
    """Batches of four runs, each in an order of its own."""
    made = [batches(seed) for seed in range(SIZE)]
    yield made
    for each in made:
        each.close()


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in arrays(tree)]).astype(np.float64)


def same_bits(one, other):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(arrays(one), arrays(other), strict=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(values=HYPERPARAMETERS, before=st.integers(0, 2), seed=st.integers(0, 2**31 - 1))
def test_one_step_is_that_of_the_trial_alone_for_any_hyperparameters(
    trainer, population, examples, values, before, seed
):
    """From equal states loss and gradients agree to 1e-6 (5e-6 after steps at any rate), and so do the parameters.

    Adam divides a gradient by its own size: where one is all cancellation, its rounding makes the update. Such are at
    most one element in ten; the others agree to 1e-6 of the largest parameter.
    """
    batch = _batch(examples, seed % 7)
    state = trainer.init(values, seed=seed)
    for _ in range(before):
        state, _ = trainer.step(state, batch, values)
    for slot in range(SIZE):
        population.put(slot, state if slot == 2 else trainer.init(SOUND, seed=slot), values if slot == 2 else SOUND)
    start = flat(state.trainable)
    after, metrics = trainer.step(state, batch, values)
    found = population.step(dict.fromkeys(range(SIZE), batch))[2]
    # Two steps at the highest of these rates leave a state near divergence, whose logits are large.
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(float(metrics[name]), rel=5e-6 if before else 1e-6)
    assert found["learning_rate"] == pytest.approx(float(metrics["learning_rate"]), rel=1e-6)
    alone, together = flat(after.trainable), flat(population.take(2).trainable)
    assert np.isfinite(together).all()
    assert (np.abs(alone - together) <= 1e-6 * np.abs(alone).max()).mean() >= 0.9
    assert np.abs(alone - start).max() > 0
    moments = zip(arrays(after.moments), arrays(population.take(2).moments), strict=True)
    for one, other in ((one, other) for one, other in moments if one.ndim > 1):
        assert np.abs(one - other).max() <= 2e-5 * np.abs(one).max()


def _batch(examples, seed):
    from jaxtune.data import train_batches

    made = train_batches(examples["train"], batch_size=4, sequence_length=12, seed=seed, packing=False)
    batch = next(made)
    made.close()
    return batch


def _fill(population, trainer, values):
    for slot, each in enumerate(values):
        population.put(slot, trainer.init(each, seed=slot), each)


def test_whole_runs_at_sound_rates_agree(trainer, population, streams, batches):
    values = [{"optimizer.learning_rate": rate, "train.steps": 20.0} for rate in (3e-4, 1e-3, 2e-3, 5e-3)]
    _fill(population, trainer, values)
    losses = np.empty((20, SIZE))
    for step in range(20):
        found = population.step({slot: next(stream) for slot, stream in enumerate(streams)})
        losses[step] = [found[slot]["loss"] for slot in range(SIZE)]
    for slot, each in enumerate(values):
        state, data = trainer.init(each, seed=slot), batches(slot)
        for step in range(20):
            state, metrics = trainer.step(state, next(data), each)
            assert losses[step, slot] == pytest.approx(float(metrics["loss"]), rel=1e-4)
        data.close()
    assert len({tuple(column) for column in losses.T}) == SIZE


def test_a_slot_has_the_same_bits_whatever_the_others_hold(trainer, population, streams):
    """Neighbours that differ in everything, that diverge, that hold NaN, and that stand idle."""
    steps = [{slot: next(stream) for slot, stream in enumerate(streams)} for _ in range(5)]
    neighbours = [
        SOUND,
        {"optimizer.learning_rate": 0.1, "update.0.rank": 1.0, "update.0.dropout": 0.5, "train.label_smoothing": 0.3},
        {"optimizer.learning_rate": 1e30},
        {"optimizer.learning_rate": float("nan")},
        None,
    ]
    ends, losses = [], []
    for values in neighbours:
        _fill(population, trainer, [values or SOUND] * 3 + [SOUND])
        found = []
        for number, batches in enumerate(steps):
            others = {} if values is None else {slot: steps[-1 - number][slot] for slot in range(3)}
            found.append(population.step({**others, 3: batches[3]})[3]["loss"])
        ends.append(population.take(3))
        losses.append(found)
    assert all(found == losses[0] for found in losses)
    assert all(same_bits(end, ends[0]) for end in ends)
    assert population.traces == 1


def test_an_idle_slot_keeps_its_bits(trainer, population, streams):
    _fill(population, trainer, [SOUND] * SIZE)
    before = population.take(1)
    for _ in range(2):
        population.step({slot: next(streams[slot]) for slot in (0, 2, 3)})
    assert same_bits(population.take(1), before)
    assert int(population.take(0).step) == 2


def test_a_slot_is_refilled_without_a_new_program(trainer, population, streams, batches):
    """After a divergence: the newcomer trains as in a fresh population, the others go on as if nothing had been."""
    wild = {"optimizer.learning_rate": float("nan")}
    feed = [[next(stream) for _ in range(6)] for stream in streams]

    def run(second):
        _fill(population, trainer, [SOUND, second, SOUND, SOUND])
        for step in range(3):
            population.step({slot: feed[slot][step] for slot in range(SIZE)})
        if second is wild:
            assert not np.isfinite(flat(population.take(1).trainable)).all()
        population.put(1, trainer.init(SOUND, seed=9), SOUND)
        for step in range(3, 6):
            population.step({slot: feed[slot][step] for slot in range(SIZE)})
        return [population.take(slot) for slot in range(SIZE)]

    traces = population.traces
    after_divergence, after_sound = run(wild), run(SOUND)
    assert all(same_bits(one, other) for one, other in zip(after_divergence, after_sound, strict=True))
    assert population.traces == max(traces, 1)


def test_trials_do_not_copy_the_frozen_base(trainer, examples):
    """The compiled step holds no array with a leading axis of trials that is as large as a base matrix."""
    population, batch = Population(trainer, 5, batched=True), _batch(examples, 0)
    text = population.compile_step(batch).as_text()
    largest = max(leaf.shape for leaf in jax.tree.leaves(trainer.params) if leaf.ndim == 3)
    copies = [f"f32[5,{','.join(map(str, largest))}]", f"f32[{largest[0]},5,{largest[1]},{largest[2]}]"]
    assert not any(copy in text for copy in copies)


def test_slots_divide_over_the_trial_axis(model, trainer):
    other = copy.copy(trainer)
    other.mesh = make_mesh(1, 1, 1, jax.devices()[:2], trial=2)
    with pytest.raises(ValueError, match="3 slots do not divide over 2 parts"):
        Population(other, 3)


@pytest.mark.parametrize("kernels", ["xla", pytest.param("interpret", marks=pytest.mark.slow)])
def test_trials_spread_over_a_mesh_axis_and_exchange_nothing(kernels, examples):
    """Two parts of two devices each: every slot is its run alone, and no array crosses from part to part."""
    sizes = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    config = DecoderConfig("llama", 96, 32, 64, 1, 4, 2, 8)

    def made(mesh):
        return Trainer(
            random_model(config, jax.random.key(0), mesh),
            UpdatePlan([LowRankRule(match="layers.*.attention.{q,v}", **sizes)]),
            TrainConfig(steps=20, batch_size=4, sequence_length=12),
            OptimizerConfig(learning_rate=1e-3),
            kernels=kernels,
        )

    trainer = made(make_mesh(2, 1, 1, jax.devices()[:4], trial=2))
    alone = made(make_mesh(1, 1, 1, jax.devices()[:1]))
    population, batch = Population(trainer, SIZE), _batch(examples, 1)
    batch = {**batch, "tokens": batch["tokens"] % 96, "targets": batch["targets"] % 96}
    for slot in range(SIZE):
        population.put(slot, trainer.init(SOUND, seed=slot), SOUND)
    found = population.step(dict.fromkeys(range(SIZE), batch))
    for slot in range(SIZE):
        state, metrics = alone.step(alone.init(SOUND, seed=slot), batch, SOUND)
        assert found[slot]["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
        together = flat(population.take(slot).trainable)
        assert np.linalg.norm(together - flat(state.trainable)) <= 1e-5 * np.linalg.norm(together)
    text = population.compile_step(batch).as_text()
    crossing = [line for line in text.splitlines() if "replica_groups" in line and not _within_parts(line)]
    # How many blocks of rows the loss loops over is agreed on by all devices: one number.
    assert all(re.match(r"\s*%\S+ = s32\[\] all-reduce\(", line) for line in crossing), crossing


def _within_parts(line):
    """Whether a collective of the compiled text stays among devices 0 and 1, and among 2 and 3."""
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", line):
        groups = [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return all(len({device // 2 for device in group}) == 1 for group in groups)
    # Two groups of neighbours; or, by name, the second of the mesh's axes.
    return bool(re.search(r"replica_groups=(\[2,2\]<=\[4\],|mesh\[.*\] \{'(axis_1|data)'\})", line))
