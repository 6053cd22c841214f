"""Losses and gradients of the linear cross-entropy against float64 NumPy and torch."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from jaxtune_kernels import linear_cross_entropy

from tests.kernels.linear_cross_entropy.oracle import float64, problem

# Largest error relative to the largest entry (of the losses: to 1 at least). float32 has sums of up to 70 products of
# sums; bfloat16 rounds each gradient of a logit, and the result, to 8 bits.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1e-2}


@functools.partial(jax.jit, static_argnames=("capped", "transposed", "block", "implementation"))
def run(given_problem, smoothing, z_loss, cap, *, capped, transposed, block, implementation):
    """Losses and gradients; the options are traced."""

    def function(hidden, head, low_rank):
        return linear_cross_entropy(
            hidden,
            head,
            given_problem.targets,
            given_problem.weights,
            transposed=transposed,
            low_rank=low_rank,
            label_smoothing=smoothing,
            z_loss=z_loss,
            soft_cap=cap if capped else None,
            block=block,
            implementation=implementation,
        )

    operands = given_problem.hidden, given_problem.head, given_problem.low_rank
    losses, pullback = jax.vjp(function, *operands)
    hidden, head, low_rank = pullback(given_problem.cotangents)
    return losses, {"hidden": hidden, "head": head} | (
        {} if low_rank is None else dict(zip("tb", low_rank, strict=True))
    )


def check(actual, expected, tolerance, name, least=0.0):
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape
    error = np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), least, 1e-30)
    assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])  # each shape compiles: no shrinking
@given(
    shape=st.sampled_from([(1,), (37,), (3, 11), (5, 1), (2, 3, 4), (130,)]),
    d=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    rank=st.sampled_from([0, 0, 1, 3]),
    transposed=st.booleans(),
    options=st.sampled_from([(0.0, 0.0, None), (0.1, 0.0, None), (0.0, 0.05, 3.0), (0.2, 0.1, 2.0)]),
    block=st.sampled_from([None, 1, 4, 7]),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_against_float64(implementation, dtype, shape, d, vocabulary, rank, transposed, options, block, share, seed):
    smoothing, z_loss, cap = options
    made = problem(shape, d, vocabulary, rank=rank, transposed=transposed, dtype=dtype, share=share, seed=seed)
    losses, gradients = run(
        made, smoothing, z_loss, cap or 1.0,
        capped=cap is not None, transposed=transposed, block=block, implementation=implementation,
    )  # fmt: skip
    expected, expected_gradients = float64(
        made, transposed=transposed, label_smoothing=smoothing, z_loss=z_loss, soft_cap=cap
    )
    assert losses.dtype == jnp.float32
    # The operands are rounded before both, so that losses are as exact in either dtype.
    check(losses, expected, TOLERANCE["float32"], "losses", least=1.0)
    assert gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        assert gradients[name].dtype == dtype
        check(gradients[name], value, TOLERANCE[dtype], name)


@pytest.mark.parametrize(("smoothing", "share"), [(0.0, 0.5), (0.15, 1.0)])
def test_against_torch(smoothing, share):
    torch = pytest.importorskip("torch")
    made = problem((3, 29), 24, 53, share=share, seed=3)
    hidden, head = (torch.from_numpy(np.array(v)).requires_grad_() for v in (made.hidden, made.head))
    targets = torch.from_numpy(np.where(np.asarray(made.weights) != 0, np.asarray(made.targets), -100)).long()
    expected = torch.nn.functional.cross_entropy(
        (hidden @ head).flatten(0, 1), targets.flatten(), label_smoothing=smoothing, reduction="none"
    )
    expected.backward(torch.from_numpy(np.array(made.cotangents)).flatten())
    losses, gradients = run(
        made, smoothing, 0.0, 1.0, capped=False, transposed=False, block=16, implementation="xla"
    )  # fmt: skip
    np.testing.assert_allclose(losses.ravel(), expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients["hidden"], hidden.grad.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients["head"], head.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_without_weight_count_for_nothing_whatever_they_hold(implementation):
    made = problem((4, 9), 8, 13, rank=2, share=0.5, seed=1)
    dropped = (np.asarray(made.weights) == 0)[..., None]
    poisoned = made._replace(
        hidden=jnp.where(dropped, jnp.nan, made.hidden),
        low_rank=(jnp.where(dropped, jnp.inf, made.low_rank[0]), made.low_rank[1]),
        targets=jnp.where(dropped[..., 0], 10**6, made.targets),
    )
    options = {"capped": True, "transposed": False, "block": 5, "implementation": implementation}
    losses, gradients = run(poisoned, 0.1, 0.01, 4.0, **options)
    clean_losses, clean_gradients = run(made, 0.1, 0.01, 4.0, **options)
    np.testing.assert_array_equal(losses, clean_losses)
    assert not np.any(losses[dropped[..., 0]])
    for name, value in clean_gradients.items():
        np.testing.assert_array_equal(gradients[name], value)
    assert not np.any(gradients["hidden"][dropped[..., 0]])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("target", [13, -1, -13, 10**6])
def test_a_target_that_is_no_class_gives_nan_in_its_row_alone(implementation, target):
    made = problem((9,), 8, 13, rank=2, share=1.0, seed=1)
    targets = made.targets.at[jnp.asarray([2, 5])].set(target)
    wrong = made._replace(targets=targets, weights=made.weights.at[5].set(0.0))
    clean = made._replace(weights=made.weights.at[5].set(0.0))
    options = {"capped": True, "transposed": False, "block": 4, "implementation": implementation}
    losses, gradients = run(wrong, 0.1, 0.01, 4.0, **options)
    right, slopes = run(clean, 0.1, 0.01, 4.0, **options)
    others = np.arange(9) != 2
    for ours, theirs in ((losses, right), (gradients["hidden"], slopes["hidden"]), (gradients["t"], slopes["t"])):
        assert np.isnan(ours[2]).all()
        np.testing.assert_array_equal(ours[others], theirs[others])
        assert not np.any(ours[5])
    assert np.isnan(gradients["head"]).any()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("shape", "d", "rank"), [((0,), 4, 2), ((3, 0), 4, 0), ((4,), 0, 2)])
def test_no_rows_or_no_width(implementation, shape, d, rank):
    made = problem(shape, d, 5, rank=rank, share=1.0)
    options = {"capped": False, "transposed": False, "block": None, "implementation": implementation}
    losses, gradients = run(made, 0.0, 0.0, 1.0, **options)
    expected, slopes = float64(made)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, value in slopes.items():
        np.testing.assert_allclose(gradients[name], value, rtol=1e-4, atol=1e-5)


def test_no_trials():
    made = problem((3,), 4, 5)
    losses = jax.jit(jax.vmap(lambda hidden: linear_cross_entropy(hidden, made.head, made.targets, made.weights)))
    assert losses(jnp.zeros((0, 3, 4))).shape == (0, 3)


def test_many_rows_on_a_cpu():
    """jaxlib 0.10.2 was seen to get rows behind the 32,768th wrong, of a log-softmax times a one-hot."""
    made = problem((40_000,), 2, 5, share=1.0)
    expected, slopes = float64(made)
    for block in (None, 40_000):
        losses, gradients = run(made, 0.0, 0.0, 1.0, capped=False, transposed=False, block=block, implementation="xla")
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradients["hidden"], slopes["hidden"], rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    made = problem((6,), 4, 9, share=1.0)
    losses, gradients = run(
        made._replace(hidden=made.hidden * 1e4), 0.0, 0.0, 1.0,
        capped=False, transposed=False, block=4, implementation="xla",
    )  # fmt: skip
    expected, _ = float64(made._replace(hidden=made.hidden * 1e4))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-2)
    assert all(np.all(np.isfinite(value)) for value in gradients.values())


def test_what_bad_arguments_get():
    made = problem((3,), 4, 5)
    operands = made.hidden, made.head, made.targets, made.weights
    with pytest.raises(ValueError, match=r"'triton'; choose from reference, xla"):
        linear_cross_entropy(*operands, implementation="triton")
    with pytest.raises(ValueError, match=r"does not fit a head of 5 × 4"):
        linear_cross_entropy(*operands, transposed=True)
    with pytest.raises(ValueError, match="low_rank has 4 classes, but head has 5"):
        linear_cross_entropy(*operands, low_rank=(jnp.zeros((3, 2)), jnp.zeros((2, 4))))
    with pytest.raises(ValueError, match="at least one axis of rows"):
        linear_cross_entropy(made.hidden[0], made.head, made.targets[0], made.weights[0])


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "soft_cap"])
def test_options_have_no_derivative_rather_than_a_wrong_one(name):
    made = problem((3,), 4, 5)

    def function(value):
        return linear_cross_entropy(made.hidden, made.head, made.targets, made.weights, **{name: value}).sum()

    with pytest.raises(NotImplementedError, match=name):
        jax.grad(function)(0.5)
