"""Batches and loops of one's own: what may be left out, what is said where something is missing or does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtune_kernels.dropout import hash_words

from jaxtune.errors import UserError
from jaxtune.training.batches import CountedBatches, as_batches, checked, completed, count_examples, count_tokens
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.objectives import Terms
from jaxtune.updates.treatments.low_rank import LowRankRule
from tests.training.tiny_trainer import LENGTH, ROWS, log_probs, own_batch, tiny_model, tiny_trainer

DROPS = (LowRankRule(match="layers.*.mlp.*", rank=2, alpha=64.0, dropout=0.5),)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def trainer(model):
    return tiny_trainer(model)


def test_a_row_without_segments_is_one_segment_whatever_has_weights(model, trainer):
    """The prompt, of weight 0, is seen: int64 ids and a mask of booleans, as NumPy makes them."""
    batch = own_batch()
    expected = -np.average(log_probs(model, batch), weights=batch["weights"])
    _, metrics = trainer.step(trainer.init(), batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert (float(metrics["tokens"]), float(metrics["weight"])) == (ROWS * LENGTH, batch["weights"].sum())
    result = trainer.evaluate(trainer.init(), [batch, batch])
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert len(result.example_ids) == 2 * ROWS


def test_dropout_of_batches_without_ids_does_not_depend_on_microbatches(model):
    batch = own_batch()
    shares = np.random.default_rng(0).random((ROWS, LENGTH), np.float32)

    def drawn_by(model, batch, hyperparameters):
        """What dropout draws by, as numbers."""
        return Terms((model.rows % 1009).astype(np.float32), batch["shares"])

    trainer = tiny_trainer(model, rules=DROPS, accumulate=4, objective=drawn_by)
    _, metrics = trainer.step(trainer.init(), {**batch, "shares": shares})
    # As of the whole batch, where each position has a number of its own.
    ids = np.repeat(np.arange(ROWS, dtype=np.uint32)[:, None] * LENGTH, LENGTH, axis=1)
    draws = np.asarray(hash_words(jnp.asarray(ids), jnp.arange(LENGTH, dtype=jnp.uint32)[None])) % 1009
    assert len(np.unique(draws)) == ROWS * LENGTH
    assert float(metrics["loss"]) == pytest.approx(np.average(draws, weights=shares), rel=1e-5)


def test_what_is_made_up_of_segments():
    segments = np.array([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3]], np.int32)
    made = completed({"tokens": segments * 0, "segment_ids": segments})
    assert made["positions"].tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 2]]
    assert made["example_ids"].tolist() == [[0, 0, 1, 1, -1], [5, 6, 7, 7, 7]]
    bare = completed({"tokens": segments * 0})
    assert bare["segment_ids"].tolist() == [[1] * 5] * 2
    assert bare["example_ids"].tolist() == [[0] * 5, [5] * 5]


def test_a_list_of_batches_is_gone_through_again_and_a_stopped_run_goes_on(trainer, tmp_path):
    data = [own_batch(seed) for seed in range(3)]
    whole = trainer.fit(data, validation=iter(data))
    assert (whole.step, whole.examples, whole.stopped) == (8, 8 * ROWS, "finished")
    assert repr(whole).startswith("FitResult(finished at step 8, loss=")
    assert len(repr(whole)) < 200
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    trainer.fit(data, until=4, checkpoints=checkpoints)
    gone_on = trainer.fit(data, checkpoints=checkpoints, validation=data)
    assert gone_on.steps_run == 4
    jax.tree.map(np.testing.assert_array_equal, gone_on.state, whole.state)
    assert gone_on.evaluation == whole.evaluation
    # A checkpoint of a loop of one's own holds no position.
    own = Checkpoints(tmp_path / "own")
    own.save(2, trainer.init())
    own.wait()
    with pytest.raises(UserError, match="2: no checkpoint of fit"):
        trainer.fit(data, checkpoints=own)
    for each in (checkpoints, own):
        each.close()


def test_batches_that_end_or_are_none(trainer):
    with pytest.raises(UserError, match=r"the batches ended after 2, and train\.steps asks for more"):
        trainer.fit(own_batch(seed) for seed in range(2))
    with pytest.raises(UserError, match="the batches ended after 0"):
        trainer.fit([])
    with pytest.raises(UserError, match=r"an iterable of batches is needed.*, not one batch"):
        as_batches(own_batch())
    with pytest.raises(UserError, match="belongs to other batches"):
        CountedBatches([own_batch()]).set_state({"epoch": 1, "row": 2})


ODD = {
    "no mapping": (lambda batch: list(batch.values()), r"a batch is a mapping of arrays .* got a list"),
    "empty": (lambda batch: {}, "got an empty one"),
    "rows differ": (
        lambda batch: {**batch, "targets": batch["targets"][:3]},
        r"batch\['targets'\] has 3 rows, but batch\['tokens'\] has 4",
    ),
    "lengths differ": (
        lambda batch: {**batch, "segment_ids": np.ones((ROWS, LENGTH + 1), int)},
        r"batch\['segment_ids'\] has the shape \(4, 7\), but batch\['tokens'\] has \(4, 6\)",
    ),
    "one row alone": (
        lambda batch: {name: array[0] for name, array in batch.items()},
        r"batch\['tokens'\] has the shape \(6,\); rows of token ids are needed",
    ),
    "floats": (
        lambda batch: {**batch, "tokens": batch["tokens"] * 1.0},
        r"batch\['tokens'\] holds float32; integers are needed",
    ),
    "a number": (lambda batch: {**batch, "beta": 0.1}, r"batch\['beta'\] is one number; every array"),
    "objects": (lambda batch: {**batch, "prompts": [{}] * ROWS}, r"batch\['prompts'\] is a ndarray"),
    "texts": (lambda batch: {**batch, "prompts": ["a"] * ROWS}, r"batch\['prompts'\] is an array of text; every"),
    "bytes": (lambda batch: {**batch, "prompts": np.full(ROWS, b"a")}, r"batch\['prompts'\] is an array of text"),
    "ragged": (lambda batch: {**batch, "tokens": [[1, 2], [3]]}, r"batch\['tokens'\] is a list, of which NumPy"),
    "other names": (
        lambda batch: {"input_ids": batch["tokens"], "labels": batch["targets"]},
        r"cross_entropy reads tokens, targets, weights of a batch .*; missing: tokens, targets, weights; the batch "
        "holds input_ids, labels",
    ),
    "no targets": (
        lambda batch: {name: batch[name] for name in ("tokens", "weights")},
        "missing: targets; the batch holds tokens, weights",
    ),
    "one target a row": (
        lambda batch: {**batch, "targets": batch["targets"][:, 0]},
        r"batch\['targets'\] has the shape \(4,\), but batch\['tokens'\] has \(4, 6\): cross_entropy needs a target",
    ),
    "targets as floats": (
        lambda batch: {**batch, "targets": batch["targets"] * 1.0},
        r"batch\['targets'\] holds float32; cross_entropy needs token ids",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_missing_or_does_not_fit_is_named(trainer, case):
    spoilt, message = ODD[case]
    state = trainer.init()
    with pytest.raises(UserError, match=message):
        trainer.step(state, checked(spoilt(own_batch())))
    with pytest.raises(UserError, match=message):
        trainer.evaluate(state, [checked(spoilt(own_batch()))])


def test_rows_that_do_not_divide_into_microbatches():
    with pytest.raises(UserError, match=r"a batch of 4 rows does not divide into train\.accumulate 3"):
        checked(own_batch(), accumulate=3)


def test_what_is_counted_of_batches():
    batch = own_batch()
    assert (count_tokens(batch), count_examples(batch)) == (ROWS * LENGTH, ROWS)
    packed = {**batch, "segment_ids": np.array([[1, 1, 2, 2, 3, 0]] * 3 + [[0] * 6])}
    assert (count_tokens(packed), count_examples(packed)) == (15, 9)
    assert (count_tokens({"chosen": batch["tokens"]}), count_examples({"chosen": batch["tokens"]})) == (0, ROWS)


def test_a_state_that_was_used_up_says_so(trainer, tmp_path):
    state, batch = trainer.init(), own_batch()
    copy = state.copy()
    after, metrics = trainer.step(state, batch)
    assert repr(state) == "TrainState(used up by a step)"
    assert repr(after).startswith("TrainState(step=1, ")
    for use in (
        lambda: trainer.step(state, batch),
        lambda: trainer.evaluate(state, [batch]),
        lambda: trainer.fit([batch], state=state),
        lambda: trainer.apply(state),
        lambda: trainer.save_adapter(tmp_path, state, base="base"),
        state.copy,
    ):
        with pytest.raises(
            UserError, match=r"this state was used up: .*state, metrics = trainer\.step.*state\.copy\(\)"
        ):
            use()
    assert float(trainer.step(copy, batch)[1]["loss"]) == float(metrics["loss"])


def test_an_objective_may_read_other_arrays_than_tokens(model):
    def pairs(model, batch, hyperparameters):
        scores = [model.head.matrix[0, batch[side][:, -1]] for side in ("better", "worse")]
        return Terms(scores[1] - scores[0], 1.0)

    def called(model, batch, hyperparameters):
        return Terms(model(batch["better"])[:, 0, 0], 1.0)

    tokens = own_batch()["tokens"]
    batch = {"better": tokens, "worse": tokens[:, ::-1].copy()}
    trainer = tiny_trainer(model, objective=pairs)
    result = trainer.fit([batch], until=2)
    assert result.metrics.keys() >= {"loss", "grad_norm"}
    assert not result.metrics.keys() & {"tokens", "tokens_per_second"}
    scores = [np.asarray(model.lm_head.kernel)[0, batch[side][:, -1]] for side in ("better", "worse")]
    assert trainer.evaluate(trainer.init(), [batch]).loss == pytest.approx((scores[1] - scores[0]).mean(), rel=1e-5)
    dropping = tiny_trainer(model, objective=called, rules=DROPS)
    with pytest.raises(UserError, match=r"dropout is drawn for each of batch\['tokens'\], and the batch holds better"):
        dropping.step(dropping.init(), batch)
    with pytest.raises(UserError, match=r"tokens of the shape \(4, 6\), but dropout .* \(4, 5\)"):
        dropping.step(dropping.init(), {**batch, "tokens": tokens[:, :5]})
