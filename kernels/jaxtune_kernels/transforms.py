"""What makes a Pallas kernel work under jit, vmap, grad, scan, remat and a mesh, in one place.

A Pallas call knows nothing of vmap (its own rule makes a loop of per-trial scalars), of derivatives, or of a mesh
(under a sharded jit it is an error on TPU and a silent gather on GPU). The order of wrappers that works under all is

    :func:`portable` → ``custom_vjp`` → ``custom_vmap`` → ``jax.shard_map`` → ``pl.pallas_call``

and :func:`grouped` is the two in the middle. A kernel is written once in its *grouped* form: arrays that differ between
trials have a group dimension ``g``, arrays held in common have none. Then:

* ``jax.vmap`` merges the mapped axis into ``g``: one launch for a whole population, with no loop around it. A trial of
  its own is the same kernel at ``g = 1``.
* Each dimension of each array has a name, and each name may be cut over axes of the mesh in context (``jax.set_mesh``).
  The kernel sees its device's share and is told what was cut, for a sum over devices or a global index.

A kernel's public function then looks like this, for ``y = (x · w) * s`` with w in common::

    def launch(cuts, x, w, s):          # x [g, m, k], w [k, n], s [g]: this device's share
        y = pl.pallas_call(...)(x, w, s)
        return psum(y, cuts["k"])       # each device has summed over its share of k

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scaled_matmul(axes, x, w, s):   # x [m, k], s []
        call = grouped(launch, ("g m k", "k n", "g"), "g m n", axes)
        return call(x[None], w, s[None])[0]

    def forward(axes, x, w, s): ...     # may call grouped(...) as well, and so may
    def backward(axes, residuals, g): ...
    scaled_matmul.defvjp(forward, backward)

    with jax.set_mesh(mesh):
        jax.jit(jax.vmap(jax.grad(lambda x, s: scaled_matmul({"m": ("data",), "n": ("tensor",)}, x, w, s).sum())))(x, s)

The derivative must be outside: a ``custom_vmap`` outside a ``custom_vjp`` does not differentiate. Outside of that only
:func:`portable` stands: it takes out of the arrays' types what they tell of a mesh (axes over which they vary inside a
``shard_map``, axes over which they are cut by type), which a derivative written by hand would have to account for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

GROUP = "g"
"""The dimension that vmap merges its axis into."""

Axes = Mapping[str, Sequence[str]]
"""Mesh axes over which each named dimension may be cut; a name that is absent stays whole."""

Cuts = Mapping[str, tuple[str, ...]]
"""Mesh axes over which each named dimension is cut, for every name; empty where the dimension is whole."""

Dimensions = Any
"""A tree of strings and None, such as ``("g m k", ("g", None))``: the names of each array's dimensions."""


def portable(function: Callable[..., Any], results: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays, for arrays whose types tell of a mesh; what is differentiated goes inside.

    Inside a ``shard_map`` that tracks them (``check_vma``), arrays have manual axes over which they vary. Operands that
    vary over fewer axes than others are cast to all of these first. What is computed of them then varies over the same
    axes, forward and backward, and the gradient of an operand that was cast is summed over devices outside.

    Over a mesh with explicit axes, arrays are cut by type, and each operation must know how its result is cut. Inside
    ``function`` all axes are left to the compiler; its results are cut as ``results`` says.

    Args:
      function: takes pytrees of arrays and returns one.
      results: takes the same operands and gives a tree of :class:`PartitionSpec` like what function returns, of which
        only explicit axes are looked at; see :func:`spec_of` and :func:`joined`.
    """

    def call(*operands: Any) -> Any:
        operands = varying_alike(operands)
        meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands))
        mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if mesh is None:
            return function(*operands)
        specs = results(*operands)
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)
        return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=places)(*operands)

    return call


def spec_of(array: Array) -> tuple[Any, ...]:
    """For each dimension of an array, the explicit mesh axes that it is cut over."""
    return tuple(jax.typeof(array).sharding.spec)


def joined(*entries: Any) -> PartitionSpec:
    """A spec of these entries, in which a mesh axis cuts the first dimension that names it."""
    used: set[str] = set()

    def left(entry: Any) -> tuple[str, ...]:
        axes = tuple(axis for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis and axis not in used)
        used.update(axes)
        return axes

    return PartitionSpec(*(left(entry) or None for entry in entries))


def varying_alike(tree: Any, like: Any = ()) -> Any:
    """The arrays of ``tree``, cast so that each varies over all manual axes that any of them, or of ``like``, does."""
    axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves((tree, like))))

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def result(shape: Sequence[int], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's result, which varies over the manual axes of ``like``."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def without_derivative(function: Callable[..., Any], message: str) -> Callable[..., Any]:
    """``function`` of arrays, of which a derivative is refused with a ``NotImplementedError`` that says ``message``.

    Inside a derivative that is written by hand, this is met by derivatives of that derivative alone.
    """

    @jax.custom_jvp
    def call(*operands: Any) -> Any:
        return function(*operands)

    @call.defjvp
    def refuse(_: Any, __: Any) -> Any:
        raise NotImplementedError(message)

    return call


def target_platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the mesh in context, or else the one that jax uses by itself."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def grouped(
    launch: Callable[..., Any], operands: Sequence[Dimensions], results: Dimensions, axes: Axes | None = None
) -> Callable[..., Any]:
    """``launch`` with a rule for vmap, cut over the mesh in context.

    Args:
      launch: takes ``cuts`` and then the operands; calls the kernel and returns its results. It may do
        whatever a shard_map's body may: collectives over the axes in ``cuts``, padding, several kernels. It is never
        differentiated.
      operands: names of the dimensions of each operand, separated by spaces: ``"g m k"``, ``"k n"``, ``""`` for a
        scalar held in common. An operand may be a tuple of arrays, or None, and so is its entry then (an operand of
        None may have names; they are not looked at).
      results: the names for what launch returns, in the same form. Every result starts with ``g``.
      axes: the mesh axes of the names. Axes that the mesh in context does not have are left out, and so are all axes of
        a name whose size they do not divide. Without a mesh in context, inside another ``shard_map`` over all axes, or
        on one device, nothing is cut.

    Returns:
      A function of the operands. Under vmap, operands with ``g`` take the mapped axis into it (those that are not
      mapped are repeated). An operand without ``g`` that is mapped has no grouped form: then the launches follow one
      another in a loop, one a trial.

    Raises:
      ValueError: a result does not start with g; or, when called, an array does not have the dimensions named, a name
        has two sizes, or one mesh axis is named for two dimensions of one array.
    """
    for names in _leaves(results):
        if names.split()[:1] != [GROUP]:
            raise ValueError(f"result {names!r} does not start with {GROUP!r}")

    @custom_vmap
    def call(*arrays: Any) -> Any:
        sizes = _sizes(operands, arrays)
        return _over_mesh(launch, operands, results, axes or {}, sizes, arrays)

    @call.def_vmap
    def rule(trials: int, mapped: list[Any], *arrays: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(arrays)
        flags, names = treedef.flatten_up_to(tuple(mapped)), jax.tree.leaves(_names(operands, arrays))
        if any(flag and GROUP not in each.split() for flag, each in zip(flags, names, strict=True)):
            return _one_by_one(call, treedef, flags, leaves)
        merged = [
            _merge(array, each.split(), flag, trials) for array, each, flag in zip(leaves, names, flags, strict=True)
        ]
        outputs = call(*treedef.unflatten(merged))
        groups = next(
            array.shape[each.split().index(GROUP) + flag]
            for array, each, flag in zip(leaves, names, flags, strict=True)
            if GROUP in each.split()
        )
        split = jax.tree.map(lambda y: y.reshape(trials, groups, *y.shape[1:]), outputs)
        return split, jax.tree.map(lambda _: True, split)

    return call


def psum(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum of ``x`` over the devices along mesh ``axes``, ``x`` itself where there are none."""
    return lax.psum(x, axes) if axes else x


def first_index(axes: tuple[str, ...], size: int) -> UInt32[Array, ""] | int:
    """The global index of this device's first entry in a dimension cut over ``axes`` in shares of ``size``.

    The integer 0 where the dimension is whole.
    """
    return lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(size) if axes else 0


def devices_in_context() -> int:
    """The number of devices over which a call of a grouped launch would be cut."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _free_axes(mesh))


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def _varying(array: Any) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _leaves(names: Dimensions) -> list[str]:
    return [leaf for leaf in jax.tree.leaves(names) if leaf is not None]


def _names(operands: Sequence[Dimensions], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The names, without those of operands that are None."""
    return jax.tree.map(
        lambda array, names: None if array is None else names, arrays, tuple(operands), is_leaf=lambda x: x is None
    )


def _sizes(operands: Sequence[Dimensions], arrays: tuple[Any, ...]) -> dict[str, int]:
    """The size of each named dimension, which all arrays must agree on."""
    sizes: dict[str, int] = {}
    for array, names in zip(jax.tree.leaves(arrays), jax.tree.leaves(_names(operands, arrays)), strict=True):
        if len(names.split()) != array.ndim:
            raise ValueError(f"an array of shape {array.shape} has no dimensions {names!r}")
        for name, size in zip(names.split(), array.shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise ValueError(f"dimension {name!r} has sizes {sizes[name]} and {size}")
    return sizes


def _merge(array: Array, names: list[str], batched: bool, trials: int) -> Array:
    """Takes the mapped axis (first, if there is one) into the group dimension, trial by trial."""
    if GROUP not in names:
        return array
    place = names.index(GROUP)
    if batched:
        array = jnp.moveaxis(array, 0, place)
    else:
        array = jnp.repeat(jnp.expand_dims(array, place), trials, axis=place)
    shape = array.shape
    return array.reshape(*shape[:place], shape[place] * shape[place + 1], *shape[place + 2 :])


def _one_by_one(call: Callable[..., Any], treedef: Any, flags: list[bool], arrays: list[Array]) -> tuple[Any, Any]:
    """The rule where an operand that the kernel holds in common differs between trials."""

    def one(mapped: list[Array]) -> Any:
        each = iter(mapped)
        return call(
            *treedef.unflatten([next(each) if flag else array for flag, array in zip(flags, arrays, strict=True)])
        )

    outputs = lax.map(one, [array for flag, array in zip(flags, arrays, strict=True) if flag])
    return outputs, jax.tree.map(lambda _: True, outputs)


def _free_axes(mesh: Any) -> tuple[str, ...]:
    """Axes of the mesh that no shard_map around us has taken."""
    if mesh.empty:
        return ()
    return tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is not AxisType.Manual
    )


def _cuts(axes: Axes, sizes: Mapping[str, int], mesh: Any) -> dict[str, tuple[str, ...]]:
    """Over which of the mesh's free axes each dimension is cut."""
    free = _free_axes(mesh)
    cuts = {}
    for name, size in sizes.items():
        wanted = tuple(axis for axis in axes.get(name, ()) if axis in free and mesh.shape[axis] > 1)
        cuts[name] = () if size % math.prod(mesh.shape[axis] for axis in wanted) else wanted
    return cuts


def _over_mesh(
    launch: Callable[..., Any],
    operands: Sequence[Dimensions],
    results: Dimensions,
    axes: Axes,
    sizes: Mapping[str, int],
    arrays: tuple[Any, ...],
) -> Any:
    """One launch on each device of the mesh in context, each on its share."""
    mesh = jax.sharding.get_abstract_mesh()
    cuts = _cuts(axes, sizes, mesh)
    free = _free_axes(mesh)
    if math.prod(mesh.shape[axis] for axis in free) == 1:
        return launch(cuts, *arrays)

    def spec(names: str) -> PartitionSpec:
        used = [axis for name in names.split() for axis in cuts[name]]
        if twice := {axis for axis in used if used.count(axis) > 1}:
            raise ValueError(f"mesh axis {min(twice)!r} is named for two dimensions of {names!r}: {dict(axes)}")
        return PartitionSpec(*(cuts[name] or None for name in names.split()))

    return jax.shard_map(
        lambda *shares: launch(cuts, *shares),
        in_specs=jax.tree.map(spec, _names(operands, arrays)),
        out_specs=jax.tree.map(spec, results),
        axis_names=set(free),
        # A kernel does not say over which axes its result varies; the results' names do.
        check_vma=False,
    )(*arrays)
