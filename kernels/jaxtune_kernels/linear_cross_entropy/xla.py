"""The linear cross-entropy without the logits, for every platform: derivative, batching rule and partitioning.

They are nested in the one order that works under all of jax's transformations: the derivative outside, in it the
batching rule, in that the partitioned loop over blocks of rows (:mod:`jaxtune_kernels.linear_cross_entropy.blocks`).

*Derivative.* The gradient of a row's loss with respect to its states is a matter of that row alone. So it is made in
the forward pass, while the row's logits are at hand (as Liger does, arXiv:2410.10989, section 3.2), and the backward
pass multiplies it by the loss' cotangent: two matmuls of the head's size in all, as many as with the logits held, where
recomputing them in the backward pass takes three. The gradient of a matrix sums over rows whose cotangents are known in
the backward pass only, so the logits are computed again there: four matmuls. jax tells which operands are
differentiated, and nothing is done for those that are not, such as a frozen head.

*Batching.* Trials that share the matrices are so many more rows: one loop for a whole population, in which the rows
that count are gathered over all trials. Trials that have matrices of their own take turns.

*Partitioning.* Rows stay on their devices, each of which orders its own. The vocabulary stays cut: devices exchange a
maximum, three sums and, going back, the states' gradient of each row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxtune_kernels.linear_cross_entropy import blocks
from jaxtune_kernels.linear_cross_entropy.blocks import Axes, Terms
from jaxtune_kernels.linear_cross_entropy.operands import Rows, Term
from jaxtune_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from jaxtune_kernels.transforms import target_platform


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the work is cut.

    Attributes:
      block: rows that are processed at once; None chooses (:func:`block_rows`).
      mesh: the mesh that the operands lie on, or None.
      axes: the mesh axes that they are cut over.
      trial_axes: the mesh axes that the trials of a population are cut over.
      population: whether the second axis of the rows holds trials.
    """

    block: int | None
    mesh: Mesh | None
    axes: Axes
    trial_axes: tuple[str, ...] = ()
    population: bool = False


class _Bounds(NamedTuple):
    """What bounds the rows of a block.

    Attributes:
      logits: most logits of a block.
      rows: fewest rows of a block, wherever there are as many.
    """

    logits: int
    rows: int


# Half a GiB of float32, and at least so many rows that reading the head does not take longer than multiplying it.
_ACCELERATOR = _Bounds(logits=2**27, rows=512)
# 8 MiB, which stay in the cache: on two cores a step of 2048 rows × 8192 classes takes half as long as in one block.
_CPU = _Bounds(logits=2**21, rows=64)
_MOST_BLOCKS = 8


def block_rows(rows: int, vocabulary: int, platform: str) -> int:
    """Rows of a block, for so many rows and classes on one device: an eighth of the rows, within two bounds.

    More blocks would leave out rows of weight 0 more closely, but read the head more often.
    """
    bounds = _CPU if platform == "cpu" else _ACCELERATOR
    step = 64
    most = bounds.logits // vocabulary // step * step
    eighth = -(-rows // (_MOST_BLOCKS * step)) * step
    return min(rows, max(bounds.rows, min(most, eighth)))


def linear_cross_entropy_xla(terms: Terms, rows: Rows, layout: Layout) -> Float[Array, "*rows"]:
    """Loss of each row; see :func:`jaxtune_kernels.linear_cross_entropy`."""
    return _differentiable(layout)(terms, rows)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What the backward pass must know of the terms beside arrays.

    Attributes:
      trained: for each term, whether the gradient of its matrix is wanted.
      transposed: for each term, whether its matrix is read transposed.
    """

    trained: tuple[bool, ...]
    transposed: tuple[bool, ...]


@functools.lru_cache(maxsize=64)
def _differentiable(layout: Layout) -> Callable[[Terms, Rows], Array]:
    @jax.custom_vjp
    def function(terms: Terms, rows: Rows) -> Array:
        return _losses(layout, (False,) * len(terms))(terms, rows)[0]

    def forward(terms: Any, rows: Any) -> tuple[Array, Any]:
        differentiated = jax.tree.map(lambda leaf: leaf.perturbed, (terms, rows), is_leaf=_is_primal)
        _check_rows(differentiated[1])
        wanted, trained = (tuple(getattr(term, part) for term in differentiated[0]) for part in ("states", "matrix"))
        terms, rows = jax.tree.map(lambda leaf: leaf.value, (terms, rows), is_leaf=_is_primal)
        found = _differentiable_again(_losses(layout, wanted), functools.partial(_dense_losses, wanted))
        losses, log_total, gradients = found(terms, rows)
        # What a matrix' gradient takes is kept only where one is wanted.
        kept = (terms, rows, log_total) if any(trained) else None
        return losses, (gradients, kept, _Static(trained, tuple(term.transposed for term in terms)))

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, None]:
        gradients, kept, static = residuals
        states = tuple(
            None if gradient is None else (cotangents[..., None] * gradient).astype(gradient.dtype)
            for gradient in gradients
        )
        matrices = (None,) * len(states)
        if kept is not None:
            function = _matrix_gradients(layout, static.trained)
            dense = functools.partial(_dense_matrix_gradients, static.trained)
            sums = _differentiable_again(function, dense)(*kept, cotangents)
            matrices = tuple(
                None if total is None else total.astype(term.matrix.dtype)
                for total, term in zip(sums, kept[0], strict=True)
            )
        return tuple(map(Term, states, matrices, static.transposed)), None

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function


def _differentiable_again(function: Callable[..., Any], dense: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the derivative of ``dense``, which computes the same and holds the logits.

    For derivatives of the derivative: of a whole training step with respect to its learning rate, say. Where they are
    not asked for, or not used under ``jax.jit``, nothing is held.
    """

    @jax.custom_vjp
    def again(*operands: Any) -> Any:
        return function(*operands)

    again.defvjp(
        lambda *operands: (function(*operands), operands),
        lambda operands, cotangents: jax.vjp(dense, *operands)[1](cotangents),
    )
    return again


def _dense_losses(wanted: tuple[bool, ...], terms: Terms, rows: Rows) -> Any:
    """What :func:`blocks.losses` gives. The logarithms are left out: nothing is differentiated through them."""

    def total(states: tuple[Array, ...]) -> tuple[Array, Array]:
        placed = tuple(Term(x, term.matrix, term.transposed) for x, term in zip(states, terms, strict=True))
        losses = linear_cross_entropy_reference(placed, rows)
        return losses.sum(), losses

    gradients, losses = jax.grad(total, has_aux=True)(tuple(term.states for term in terms))
    gradients = tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return losses, jnp.zeros_like(losses), gradients


def _dense_matrix_gradients(
    wanted: tuple[bool, ...], terms: Terms, rows: Rows, _log_total: Array, cotangents: Array
) -> Any:
    """What :func:`blocks.matrix_gradients` gives, as a function of the terms alone: the logarithms are made of them."""

    def total(matrices: tuple[Array, ...]) -> Array:
        placed = tuple(Term(term.states, x, term.transposed) for x, term in zip(matrices, terms, strict=True))
        return jnp.sum(cotangents * linear_cross_entropy_reference(placed, rows))

    gradients = jax.grad(total)(tuple(term.matrix.astype(jnp.float32) for term in terms))
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _check_rows(differentiated: Rows) -> None:
    for name in ("label_smoothing", "z_loss", "soft_cap"):
        if getattr(differentiated, name):
            raise NotImplementedError(f"linear_cross_entropy has no derivative with respect to {name}")


@functools.lru_cache(maxsize=64)
def _losses(layout: Layout, wanted: tuple[bool, ...]) -> Callable[..., Any]:
    """:func:`blocks.losses` for rows of any number of axes, partitioned and with a batching rule."""

    @custom_vmap
    @jax.jit
    def function(terms: Terms, rows: Rows) -> Any:
        def local(terms: Terms, rows: Rows) -> Any:
            shape = rows.targets.shape
            terms, rows = _flat(terms, rows, len(shape))
            found = blocks.losses(terms, rows, block=_block(layout, terms), axes=axes, wanted=wanted)
            return jax.tree.map(lambda array: array.reshape(*shape, *array.shape[1:]), found)

        axes, by_row, matrix_specs = _partition(layout, terms, rows)
        outputs = (by_row, by_row, tuple(by_row if want else None for want in wanted))
        return _mapped(layout, local, (_term_specs(terms, by_row, matrix_specs), by_row), outputs)(terms, rows)

    @function.def_vmap
    def batched(size: int, is_batched: Any, terms: Terms, rows: Rows) -> tuple[Any, Any]:
        if any(term.matrix for term in is_batched[0]):
            found = _in_turn(function, size, is_batched, terms, rows)
        else:
            # Behind the first axis of the rows, which is the one that may be cut over devices.
            def folded(array: Array, has_trials: bool, matrix: bool = False) -> Array:
                if matrix:
                    return array
                return jnp.moveaxis(array, 0, 1) if has_trials else jnp.repeat(array[:, None], size, axis=1)

            folded_terms = tuple(
                Term(folded(term.states, flags.states), term.matrix, term.transposed)
                for term, flags in zip(terms, is_batched[0], strict=True)
            )
            of_population = _losses(dataclasses.replace(layout, population=True), wanted)
            found = of_population(folded_terms, jax.tree.map(folded, rows, is_batched[1]))
            found = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), found)
        return found, jax.tree.map(lambda _: True, found)

    return function


@functools.lru_cache(maxsize=64)
def _matrix_gradients(layout: Layout, wanted: tuple[bool, ...]) -> Callable[..., Any]:
    """:func:`blocks.matrix_gradients` for rows of any number of axes, partitioned and with a batching rule."""

    @custom_vmap
    @jax.jit
    def function(terms: Terms, rows: Rows, log_total: Array, cotangents: Array) -> Any:
        def local(terms: Terms, rows: Rows, *numbers: Array) -> Any:
            terms, (rows, numbers) = _flat(terms, (rows, numbers), rows.targets.ndim)
            return blocks.matrix_gradients(terms, rows, *numbers, block=_block(layout, terms), axes=axes, wanted=wanted)

        axes, by_row, matrix_specs = _partition(layout, terms, rows)
        inputs = (_term_specs(terms, by_row, matrix_specs), by_row, by_row, by_row)
        outputs = tuple(spec if want else None for spec, want in zip(matrix_specs, wanted, strict=True))
        return _mapped(layout, local, inputs, outputs)(terms, rows, log_total, cotangents)

    @function.def_vmap
    def batched(size: int, is_batched: Any, *operands: Any) -> tuple[Any, Any]:
        found = _in_turn(function, size, is_batched, *operands)
        return found, jax.tree.map(lambda _: True, found)

    return function


def _flat(terms: Terms, by_row: Any, axes: int) -> tuple[Terms, Any]:
    """All operands with one axis of rows."""

    def flat(array: Array) -> Array:
        return array.reshape(math.prod(array.shape[:axes]), *array.shape[axes:])

    return tuple(Term(flat(term.states), term.matrix, term.transposed) for term in terms), jax.tree.map(flat, by_row)


def _block(layout: Layout, terms: Terms) -> int:
    if layout.block is not None:
        return layout.block
    platform = target_platform() if layout.mesh is None else layout.mesh.devices.flat[0].platform
    vocabulary = terms[0].matrix.shape[0 if terms[0].transposed else 1]
    return block_rows(terms[0].states.shape[0], vocabulary, platform)


def _in_turn(function: Callable[..., Any], size: int, is_batched: Any, *operands: Any) -> Any:
    """``function`` of one trial after the other."""

    def of_trial(trial: Array) -> Any:
        def chosen(array: Array, has_trials: bool) -> Array:
            return lax.dynamic_index_in_dim(array, trial, keepdims=False) if has_trials else array

        return function(*jax.tree.map(chosen, operands, tuple(is_batched)))

    return lax.map(of_trial, jnp.arange(size))


def _partition(layout: Layout, terms: Terms, rows: Rows) -> tuple[Axes, PartitionSpec, tuple[PartitionSpec, ...]]:
    """The axes that cut these operands, and the specs of all that is by row and of each term's matrix.

    An axis that the mesh lacks, or whose size does not divide the operands, cuts nothing.
    """
    sizes = {} if layout.mesh is None else dict(layout.mesh.shape)

    def dividing(names: tuple[str, ...], size: int) -> tuple[str, ...]:
        wanted = tuple(name for name in names if sizes.get(name, 1) > 1)
        return () if size % math.prod(sizes[name] for name in wanted) else wanted

    row_axes = dividing(layout.axes.rows, rows.targets.shape[0])
    trial_axes = dividing(layout.trial_axes, rows.targets.shape[1]) if layout.population else ()
    vocabulary = layout.axes.vocabulary if sizes.get(layout.axes.vocabulary or "", 1) > 1 else None
    if vocabulary is not None and terms[0].matrix.shape[0 if terms[0].transposed else 1] % sizes[vocabulary]:
        vocabulary = None
    specs = tuple(
        PartitionSpec(vocabulary, None) if term.transposed else PartitionSpec(None, vocabulary) for term in terms
    )
    by_row = PartitionSpec(row_axes or None, trial_axes) if trial_axes else PartitionSpec(row_axes or None)
    return Axes((*row_axes, *trial_axes), vocabulary), by_row, specs


def _term_specs(terms: Terms, by_row: PartitionSpec, matrices: tuple[PartitionSpec, ...]) -> tuple[Term, ...]:
    return tuple(Term(by_row, matrix, term.transposed) for term, matrix in zip(terms, matrices, strict=True))


def _mapped(layout: Layout, local: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    if layout.mesh is None or layout.mesh.size == 1:
        return local
    # What kinds of axes the mesh has at this place, a mesh in context knows.
    mesh = layout.mesh if jax.sharding.get_abstract_mesh().empty else None
    # Nothing is differentiated through this, so that no varying axes need be tracked.
    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
