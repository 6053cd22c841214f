"""AdamW, momentum and Lion that touch only the selected blocks of a tensor, in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, UInt32

from jaxtune_kernels.dropout import hash_words
from jaxtune_kernels.masked_update.blocks import Blocks, Selection
from jaxtune_kernels.masked_update.operands import Operands, Results
from jaxtune_kernels.masked_update.partition import (
    Axes,
    Partition,
    carry_moments,
    share_out,
    update_tensor,
    update_whole,
)
from jaxtune_kernels.masked_update.reference import masked_update_reference
from jaxtune_kernels.masked_update.rules import UPDATE_RULES, Coefficients
from jaxtune_kernels.masked_update.xla import masked_update_xla, put, take
from jaxtune_kernels.transforms import joined, portable, spec_of, target_platform

Implementation = Literal["reference", "xla", "pallas", "tpu", "gpu"]
PyTree = Any
Scalar = Float[Array, ""] | float

__all__ = ["BlockState", "MaskedUpdate", "Selection", "masked_update", "put_blocks", "share_out_blocks", "take_blocks"]


class BlockState(NamedTuple):
    """The optimizer state of one tensor: nothing of it belongs to a block that is not selected.

    Attributes:
      indices: numbers of the selected blocks; None if all are.
      steps: updates that each has had since it was selected, which AdamW's bias correction goes by.
      moments: the rule's running means over each selected block (AdamW has two, Lion and SGD one).
    """

    indices: Int32[Array, " n"] | None
    steps: Int32[Array, " n"]
    moments: tuple[Float[Array, "n block_rows block_columns"], ...]

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        _, rows, columns = self.moments[0].shape
        return rows, columns


class MaskedUpdate(NamedTuple):
    """What :func:`masked_update` gives.

    Attributes:
      init: ``init(params, selection) -> state``.
      apply: ``apply(grads, state, params, learning_rate, …) -> (params, state)``.
      reselect: ``reselect(state, params, selection) -> state``.
    """

    init: Callable[..., PyTree]
    apply: Callable[..., tuple[PyTree, PyTree]]
    reselect: Callable[..., PyTree]


def masked_update(
    rule: str = "adamw",
    *,
    moment_dtype: Any = jnp.float32,
    axes: PyTree = None,
    trial_axes: Sequence[str] = (),
    implementation: str | None = None,
    interpret: Any = False,
) -> MaskedUpdate:
    """An optimizer whose time and memory grow with the selected share of the parameters, not with the parameters.

    ``init(params, selection)`` takes a tree of float32 or bfloat16 tensors and a tree of :class:`Selection` of the same
    structure; a selection of None leaves its tensor out.

    ``apply(grads, state, params, learning_rate, *, b1, b2, epsilon, weight_decay, clip, seed)`` moves the selected
    blocks. A gradient is that of the selected blocks, ``[n, block rows, block columns]`` in the order of the indices,
    which is what one has who differentiates with respect to :func:`take_blocks`, or that of the whole tensor. All
    scalars may be traced. bfloat16 is rounded to stochastically and needs a ``seed``, which must differ between steps;
    float32 needs none. Donate parameters and state: then they are updated where they are. Let them be arguments of the
    jitted step in the order in which it returns them, because ``jax.jit`` gives a result the first donated array of its
    size, and a parameter that lands in the place of a moment is copied.

    ``reselect(state, params, selection)`` goes on with other blocks: moments stay with blocks that stay selected, and
    are zero for new ones, which start AdamW's bias correction anew. While the number of blocks is the same, this
    compiles nothing new.

    All three work under jit, vmap (one launch for all trials), scan, and over a mesh. They have no derivative.

    Args:
      rule: "adamw", "sgd" (momentum ``b1``) or "lion".
      moment_dtype: float32 or bfloat16.
      axes: over which axes of the mesh in context (``jax.set_mesh``) the tensors are cut, for each as a mapping from
        dimension to axes, ``{0: ("fsdp",)}``; one for all of them, or a tree like the parameters. A dimension that
        a block spans is cut inside the blocks. Along other dimensions each device must own equally many of the selected
        blocks, and the indices be sorted by device first (:func:`share_out_blocks`); where the first dimension alone is
        cut, sorted indices are.
      trial_axes: the mesh axes that trials, mapped by ``jax.vmap``, are cut over.
      implementation: None picks the best for the platform; "reference" is the definition, "xla" the portable one, "tpu"
        and "gpu" are the kernels, "pallas" that of the platform of the mesh in context, or of jax's default one.
      interpret: runs the kernels step by step, on any platform; as ``pallas_call`` takes it.

    Raises:
      ValueError: the rule, implementation or dtype is unknown; from ``apply``, a seed is missing, or a gradient or a
        cut does not fit the blocks.
    """
    if rule not in UPDATE_RULES:
        raise ValueError(f"unknown rule {rule!r}; choose from {', '.join(UPDATE_RULES)}")
    choices = get_args(Implementation)
    if implementation is not None and implementation not in choices:
        raise ValueError(f"unknown implementation {implementation!r}; choose from {', '.join(choices)}")
    _check_dtype(moment_dtype)
    choose = functools.partial(_choose, implementation, interpret)

    def partition(param: Array, block: tuple[int | None, int | None], cut: Axes | None) -> Partition:
        return Partition(Blocks.of(param.shape, block), cut or {}, tuple(trial_axes))

    def init(params: PyTree, selection: PyTree) -> PyTree:
        def one(param: Array, selected: Selection | None) -> BlockState | None:
            if selected is None:
                return None
            _check_dtype(param.dtype)
            blocks = Blocks.of(param.shape, selected.block)
            count = blocks.count if selected.indices is None else selected.indices.shape[0]
            moments = tuple(jnp.zeros((count, *blocks.block), moment_dtype) for _ in range(UPDATE_RULES[rule].moments))
            return BlockState(selected.indices, jnp.zeros((count,), jnp.int32), moments)

        leaves, treedef = jax.tree.flatten(params)
        return treedef.unflatten([one(*leaf) for leaf in zip(leaves, treedef.flatten_up_to(selection), strict=True)])

    def apply(
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        learning_rate: Scalar,
        *,
        b1: Scalar = UPDATE_RULES[rule].b1,
        b2: Scalar = UPDATE_RULES[rule].b2,
        epsilon: Scalar = 1e-8,
        weight_decay: Scalar = 0.0,
        clip: Scalar = 1.0,
        seed: UInt32[Array, ""] | int | None = None,
    ) -> tuple[PyTree, PyTree]:
        coefficients = Coefficients(learning_rate, b1, b2, epsilon, weight_decay, clip)

        def one(number: int, param: Array, old: BlockState | None, grad: Array, cut: Axes | None):
            if old is None:
                return param, None
            narrow = [v.dtype for v in (param, *old.moments) if v.dtype != jnp.float32]
            if narrow and seed is None:
                raise ValueError(f"rounding to {narrow[0]} needs a seed")
            steps = old.steps + 1
            where, draw = partition(param, old.block, cut), hash_words(0 if seed is None else seed, number)
            # A kernel has nothing to skip where all is selected, and XLA makes one pass of it by itself.
            if old.indices is None and where.blocks.is_row_of_matrices and implementation in (None, "xla"):
                new, moments = update_whole(
                    where.blocks, UPDATE_RULES[rule], param, grad, old.moments, steps, coefficients, draw
                )
            else:
                every = jnp.arange(where.blocks.count, dtype=jnp.int32)
                new, moments = update_tensor(
                    where, UPDATE_RULES[rule], choose, param, grad, old.moments,
                    every if old.indices is None else old.indices, steps, coefficients, draw,
                )  # fmt: skip
            return new, BlockState(old.indices, steps, moments)

        leaves, treedef = jax.tree.flatten(params)
        states, gradients = treedef.flatten_up_to(state), treedef.flatten_up_to(grads)
        cuts = _axes_of_leaves(axes, treedef)
        moved = [one(number, *leaf) for number, leaf in enumerate(zip(leaves, states, gradients, cuts, strict=True))]
        return treedef.unflatten([new for new, _ in moved]), treedef.unflatten([new for _, new in moved])

    def reselect(state: PyTree, params: PyTree, selection: PyTree) -> PyTree:
        def one(old: BlockState | None, param: Array, selected: Selection | None, cut: Axes | None):
            if old is None or selected is None:
                return None
            if old.indices is None or selected.indices is None:
                raise ValueError("a selection of all blocks stays; give indices to select others later")
            where = partition(param, selected.block, cut)
            moments, steps = carry_moments(where, old.moments, old.steps, old.indices, selected.indices)
            return BlockState(selected.indices, steps, moments)

        leaves, treedef = jax.tree.flatten(params)
        states, selections = treedef.flatten_up_to(state), treedef.flatten_up_to(selection)
        cuts = _axes_of_leaves(axes, treedef)
        return treedef.unflatten([one(*leaf) for leaf in zip(states, leaves, selections, cuts, strict=True)])

    return MaskedUpdate(init, apply, reselect)


def take_blocks(param: Float[Array, "..."], selection: Selection) -> Float[Array, "n block_rows block_columns"]:
    """The selected blocks of a tensor: what a trainer differentiates with respect to. Zeros outside the tensor."""
    blocks = Blocks.of(param.shape, selection.block)

    def function(param: Array, indices: Array) -> Array:
        return take(blocks, param.reshape(blocks.shape), indices)

    def place(param: Array, _: Array) -> PartitionSpec:
        rows, columns = (None, None, *spec_of(param))[-2:]
        spans = blocks.block_rows == blocks.rows, blocks.block_columns == blocks.columns
        return joined(None, rows if spans[0] else None, columns if spans[1] else None)

    return portable(function, place)(param, selection.indices)


def put_blocks(
    param: Float[Array, "*shape"], selection: Selection, values: Float[Array, "n block_rows block_columns"]
) -> Float[Array, "*shape"]:
    """The tensor with the selected blocks replaced; differentiable in both."""
    blocks = Blocks.of(param.shape, selection.block)

    def function(param: Array, indices: Array, values: Array) -> Array:
        return put(blocks, param.reshape(blocks.shape), indices, values).reshape(param.shape)

    return portable(function, lambda param, *_: joined(*spec_of(param)))(param, selection.indices, values)


def share_out_blocks(selection: Selection, shape: Sequence[int], devices: Sequence[int]) -> Selection:
    """The selection sorted by device, for a tensor that is cut along dimensions with several blocks.

    Args:
      selection: has equally many blocks on every device.
      shape: the tensor's.
      devices: over how many devices each dimension of the tensor is cut.
    """
    blocks = Blocks.of(tuple(shape), selection.block)
    counts = (1,) * (2 - len(devices)) + tuple(devices)
    return Selection(share_out(selection.indices, blocks, counts), selection.block)


def _axes_of_leaves(axes: PyTree, treedef: Any) -> list[Axes | None]:
    """A mapping from dimension to mesh axes for each tensor, or None."""
    one_for_all = axes is None or (isinstance(axes, dict) and all(isinstance(key, int) for key in axes))
    return [axes] * treedef.num_leaves if one_for_all else treedef.flatten_up_to(axes)


def _check_dtype(dtype: Any) -> None:
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{jnp.dtype(dtype)} is neither float32 nor bfloat16")


def _choose(implementation: str | None, interpret: Any, blocks: Blocks, operands: Operands) -> Callable[..., Results]:
    """The implementation for these blocks; without a wish, that of the platform that the program is compiled for."""
    # Imported here: half a second of Pallas, which whoever updates whole tensors does without.
    from jaxtune_kernels.masked_update.gpu import masked_update_gpu
    from jaxtune_kernels.masked_update.tpu import masked_update_tpu, unsupported

    functions: dict[str, Callable[..., Results]] = {
        "reference": masked_update_reference,
        "xla": masked_update_xla,
        "tpu": functools.partial(masked_update_tpu, interpret=interpret),
        "gpu": functools.partial(masked_update_gpu, interpret=interpret),
    }
    if implementation == "pallas":
        implementation = target_platform()
        if implementation not in functions:
            raise ValueError(f"there is no Pallas kernel for {implementation}; implementation 'xla' runs there")
    if implementation is not None:
        return functions[implementation]
    on_tpu = functions["xla"] if unsupported(blocks, operands) else functions["tpu"]

    def by_platform(rule: Any, blocks: Blocks, operands: Operands) -> Results:
        return lax.platform_dependent(
            operands,
            tpu=functools.partial(on_tpu, rule, blocks),
            cuda=functools.partial(functions["gpu"], rule, blocks),
            default=functools.partial(functions["xla"], rule, blocks),
        )

    return by_platform
