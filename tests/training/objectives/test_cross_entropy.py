"""The losses against float64 NumPy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.models import Head
from jaxtune.training.objectives import cross_entropy


def computed(logits, targets, weights, smoothing=0.0, z_loss=0.0):
    """The objective over given logits: they are the model's hidden states, and its head changes nothing."""
    places = jnp.zeros(targets.shape, jnp.int32)
    batch = {
        "tokens": places,
        "targets": jnp.asarray(targets, jnp.int32),
        "positions": places,
        "segment_ids": places,
        "weights": jnp.asarray(weights, jnp.float32),
    }
    values = {"train.label_smoothing": jnp.float32(smoothing), "train.z_loss": jnp.float32(z_loss)}

    class Model:
        head = Head(jnp.eye(logits.shape[-1]), tied=False)

        def __call__(self, tokens, positions=None, segment_ids=None):
            return self.head.logits(self.hidden(tokens, positions, segment_ids))

        def hidden(self, tokens, positions=None, segment_ids=None):
            return jnp.asarray(logits, jnp.float32)

        @property
        def reference(self):
            return self

    terms = cross_entropy(Model(), batch, values)
    return terms.losses, terms.weights


def expected(logits, targets, smoothing, z_loss):
    """Cross-entropy with the smoothed distribution written out, in float64."""
    logits = logits.astype(np.float64)
    vocabulary = logits.shape[-1]
    top = logits.max(axis=-1, keepdims=True)
    normalizer = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
    smoothed = np.full(logits.shape, smoothing / vocabulary)
    np.put_along_axis(smoothed, targets[..., None], 1 - smoothing + smoothing / vocabulary, axis=-1)
    return -(smoothed * (logits - normalizer[..., None])).sum(axis=-1) + z_loss * normalizer**2


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 1, 2), (2, 3, 7), (3, 2, 33)]),
    st.floats(0, 0.9),
    st.floats(0, 0.1),
    st.integers(0, 2**31),
)
def test_float64(shape, smoothing, z_loss, seed):
    generator = np.random.default_rng(seed)
    logits = (5 * generator.standard_normal(shape)).astype(np.float32)
    targets = generator.integers(0, shape[-1], shape[:2])
    weights = generator.random(shape[:2]).astype(np.float32)
    losses, found_weights = computed(logits, targets, weights, smoothing, z_loss)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected(logits, targets, smoothing, z_loss), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found_weights, weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_values_and_gradients_of_torch(smoothing):
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(1)
    logits = (3 * generator.standard_normal((2, 5, 11))).astype(np.float32)
    targets, weights = generator.integers(0, 11, (2, 5)), generator.random((2, 5)).astype(np.float32)

    def mean(logits):
        losses, weights_ = computed(logits, targets, weights, smoothing)
        return jnp.sum(losses * weights_) / jnp.sum(weights_)

    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, 11), torch.tensor(targets).reshape(-1), reduction="none", label_smoothing=smoothing
    ).reshape(2, 5)
    weight = torch.tensor(weights, dtype=torch.float64)
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    value, gradient = jax.value_and_grad(mean)(jnp.asarray(logits))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)


def test_large_logits_do_not_overflow():
    logits = np.array([[[1e4, -1e4, 0.0]]], np.float32)
    losses, _ = computed(logits, np.array([[0]]), np.ones((1, 1)))
    assert losses[0, 0] == 0
