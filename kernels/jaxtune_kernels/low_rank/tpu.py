"""The grouped low-rank product on TPU (Pallas, Mosaic): x W and the low-rank term in one pass over x.

The grid is (groups, rows, columns, inner) and runs in order, the last fastest. While the first block of columns is
computed, the block's h = x A is built in scratch as well, from the x that is on chip for x W anyway; each block of
columns ends by adding its piece of h B, before it is rounded and written. So y is written once and never read, and x is
read once where a block holds all of K or all of N::

            columns →                      A, K × r
          ┌────┬────┬────┐  W, K × N      ┌┐
     K    │    │    │    │                ││
          └────┴────┴────┘                └┘
    ┌────┐┌────┬────┬────┐                ┌┐
    │ x  ││ y₀ │ y₁ │ y₂ │     during y₀: ││ h, kept on chip for y₁ and y₂
    └────┘└────┴────┴────┘                └┘

Otherwise (K cut, more than one block of columns) x is read once for each block of columns; W is always read once for
each block of rows, unless it is a single block. :func:`~jaxtune_kernels.low_rank.tpu_tiles.hbm_bytes` is the count.

A W of few bits is fetched as codes, half a byte or a byte an entry, and its block made once a step in scratch, however
many rows and adapters the step works on.

The matrix unit is 128 (v5e, v5p) or 256 (v6e) wide, so x A and h B cost a pass of that width each, whatever the rank.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from jaxtune_kernels.dropout import column_keys, drop_threshold, keep_bits, row_keys
from jaxtune_kernels.low_rank.tpu_tiles import VMEM_LIMIT, Problem, Tiles, choose_tiles, hbm_bytes
from jaxtune_kernels.quantized import Quantized, block_values, matrix
from jaxtune_kernels.transforms import result

GroupedDropout = tuple[Float[Array, " g"], UInt32[Array, " g"], UInt32[Array, "g m"]]

# Columns of x that are masked at once on their way into A, which bounds the mask's temporaries.
_MASKED_COLUMNS = 512


def low_rank_product(
    x: Float[Array, "g m k"],
    w: Float[Array, "..."] | Quantized,
    a: Float[Array, "g k r"],
    b: Float[Array, "g r n"],
    scale: Float[Array, " g"],
    bias: Float[Array, " n"] | None,
    dropout: GroupedDropout | None,
    *,
    transposed: bool,
    drop: Literal["input", "output"],
    first_column: UInt32[Array, ""] | int = 0,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "g m n"], Float[Array, "g m r"]]:
    """``y = x W + scale · h b + bias`` for g adapters over one W, and h, in one launch.

    With ``drop="input"``, h = (mask(x) / (1 - rate)) a: the forward pass. With ``drop="output"``, h = x a, and the
    low-rank term is masked and divided: the backward pass, with x the gradient of y, a = Bᵀ and b = Aᵀ, where the mask
    of the forward pass's input sits on the output. Sums are float32; a and b are rounded to x's dtype.

    Args:
      x: rows of each adapter.
      w: W, held in common, [k, n], or [n, k] if transposed; cast to x's dtype, or made of codes, block by block. One
        whose blocks of entries the tiles do not fit is written out first.
      a: the first factor of each adapter.
      b: the second factor of each adapter.
      scale: float32, the factor on each adapter's term.
      bias: added to every row.
      dropout: rate, seed and row identities of each adapter.
      transposed: W is stored [n, k]; it is read so, not copied.
      drop: where the mask sits.
      first_column: the index, in the whole array, of the first column that the mask is drawn for, where that dimension
        is cut over devices.
      tiles: by default what :func:`~jaxtune_kernels.low_rank.tpu_tiles.choose_tiles` says.

    Returns:
      y and h, in x's dtype.
    """
    (g, m, k), n, r = x.shape, b.shape[-1], a.shape[-1]
    if w.shape != ((n, k) if transposed else (k, n)):
        raise ValueError(f"W of shape {w.shape} does not fit x {x.shape} and b {b.shape} with transposed={transposed}")
    held = w.codes if isinstance(w, Quantized) else w
    problem = Problem(g, m, k, n, r, x.dtype.itemsize, held.dtype.itemsize, dropout is not None)
    tiles = tiles or choose_tiles(problem)
    if isinstance(w, Quantized) and not _whole_blocks(w, tiles.columns if transposed else tiles.inner):
        held = w = matrix(w, x.dtype)
    body = functools.partial(_body, problem, tiles, transposed, drop)
    boost = jnp.ones((g,), jnp.float32) if dropout is None else 1.0 / (1.0 - dropout[0])
    operands: dict[str, Any] = {
        "h_factor": boost if drop == "input" else jnp.ones((g,), jnp.float32),
        "term_factor": scale * boost,
        "x": x,
        "w": held,
        # With K along the lanes neither factor is padded to 128 columns; for the backward pass this is B as it is.
        "a": a.astype(x.dtype).mT,
        "b": b.astype(x.dtype),
    }
    if isinstance(w, Quantized):
        operands["absmax"] = w.absmax.astype(jnp.float32)
    if bias is not None:
        operands["bias"] = bias[None]
    if dropout is not None:
        rate, seed, rows = dropout
        operands["threshold"] = drop_threshold(rate)
        operands["row_key"] = row_keys(seed[:, None], rows)[..., None]
        operands["column_key"] = column_keys(seed, k if drop == "input" else n, first_column)[:, None]
    specs = _block_specs(problem, tiles, transposed, drop)
    if isinstance(w, Quantized):
        specs["absmax"] = _absmax_spec(w, tiles, transposed)
    scratch = {
        "h_sum": pltpu.VMEM((tiles.groups, tiles.rows, r), jnp.float32),
        "scaled_h": pltpu.VMEM((tiles.groups, tiles.rows, r), x.dtype),
    }
    if tiles.inner < k:
        scratch["y_sum"] = pltpu.VMEM((tiles.groups, tiles.rows, tiles.columns), jnp.float32)
    if isinstance(w, Quantized):
        scratch["matrix"] = pltpu.VMEM(specs["w"].block_shape, x.dtype)  # pyright: ignore[reportArgumentType]
    names = [*operands, "y", "h", *scratch]
    y, h = pl.pallas_call(
        lambda *refs: body(dict(zip(names, refs, strict=True))),
        grid=tiles.grid(problem),
        in_specs=[specs[name] for name in operands],
        out_specs=[specs["y"], specs["h"]],
        out_shape=[result((g, m, n), x.dtype, x), result((g, m, r), x.dtype, x)],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        # What XLA plans around the kernel with, which it cannot look into.
        cost_estimate=pl.CostEstimate(
            flops=2 * g * m * (k * n + r * (k + n)), bytes_accessed=hbm_bytes(problem, tiles), transcendentals=0
        ),
        name="low_rank_product",
    )(*operands.values())
    return y, h


def _block_specs(problem: Problem, tiles: Tiles, transposed: bool, drop: str) -> dict[str, pl.BlockSpec]:
    """Which block of each array a step (group, row, column, inner) sees."""
    groups, rows, columns, inner = tiles
    last = tiles.grid(problem)[3] - 1

    def inner_of_first_column(j: Any, c: Any) -> Any:
        # After the first block of columns A is not used: an index that stays is not fetched again.
        return jnp.where(j == 0, c, last) if last else c

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    specs = {
        "h_factor": scalars,
        "term_factor": scalars,
        "threshold": scalars,
        "x": pl.BlockSpec((groups, rows, inner), lambda g, i, j, c: (g, i, c)),
        "w": pl.BlockSpec((columns, inner), lambda g, i, j, c: (j, c))
        if transposed
        else pl.BlockSpec((inner, columns), lambda g, i, j, c: (c, j)),
        "a": pl.BlockSpec((groups, problem.r, inner), lambda g, i, j, c: (g, 0, inner_of_first_column(j, c))),
        "b": pl.BlockSpec((groups, problem.r, columns), lambda g, i, j, c: (g, 0, j)),
        "bias": pl.BlockSpec((1, columns), lambda g, i, j, c: (0, j)),
        "row_key": pl.BlockSpec((groups, rows, 1), lambda g, i, j, c: (g, i, 0)),
        "y": pl.BlockSpec((groups, rows, columns), lambda g, i, j, c: (g, i, j)),
        "h": pl.BlockSpec((groups, rows, problem.r), lambda g, i, j, c: (g, i, 0)),
    }
    if drop == "input":
        specs["column_key"] = pl.BlockSpec((groups, 1, inner), lambda g, i, j, c: (g, 0, inner_of_first_column(j, c)))
    else:
        specs["column_key"] = pl.BlockSpec((groups, 1, columns), lambda g, i, j, c: (g, 0, j))
    return specs


def _whole_blocks(w: Quantized, tile: int) -> bool:
    """Whether a tile of W's first axis holds whole blocks of entries, as many as absmax can be cut to on chip."""
    size = w.shape[0] // w.absmax.shape[0]
    return w.kind == "int8" or (w.kind == "nf4" and size == 64 and (tile == w.shape[0] or tile % (8 * size) == 0))


def _absmax_spec(w: Quantized, tiles: Tiles, transposed: bool) -> pl.BlockSpec:
    """The absmax of a step's block of W; of whole columns there is one row, which every step sees."""
    along, across = (tiles.columns, tiles.inner) if transposed else (tiles.inner, tiles.columns)
    blocks = w.absmax.shape[0]
    count = 1 if blocks == 1 else along * blocks // w.shape[0]
    if transposed:
        return pl.BlockSpec((count, across), lambda g, i, j, c: (0 if blocks == 1 else j, c))
    return pl.BlockSpec((count, across), lambda g, i, j, c: (0 if blocks == 1 else c, j))


def _make_matrix(refs: dict[str, Any]) -> None:
    """Makes the block of W of its codes, in scratch, some rows at a time: in float32 the whole would not fit."""
    codes, absmax, block = refs["w"], refs["absmax"], refs["matrix"]
    whole = absmax.shape[0] == 1
    height = block.shape[0] // absmax.shape[0]
    if whole and height % 64 == 0:
        height = 64

    def some(index: Any) -> None:
        rows = pl.ds(pl.multiple_of(index * height, height), height)
        factors = absmax[...] if whole else absmax[pl.ds(index, 1), :]
        block[rows, :] = block_values(codes[rows, :], factors, block.dtype)

    if height == block.shape[0]:
        block[...] = block_values(codes[...], absmax[...], block.dtype)
    else:
        pl.loop(0, block.shape[0] // height)(some)


def _body(problem: Problem, tiles: Tiles, transposed: bool, drop: str, refs: dict[str, Any]) -> None:
    """One step of the grid; refs by name."""
    steps = tiles.grid(problem)[3]
    first_group, column, step = pl.program_id(0) * tiles.groups, pl.program_id(2), pl.program_id(3)
    # What lies behind the end of K in a last block is not zero, and would be summed.
    valid = None if problem.k % tiles.inner == 0 else problem.k - step * tiles.inner
    height = tiles.rows_at_once

    def work(index: Any, rows: Any) -> None:
        """This step's share of some rows of one adapter."""
        at, group = (index, rows), first_group + index

        @pl.when(column == 0)
        def _() -> None:
            _add_h(tiles, drop, refs, at, group, step, steps, valid)

        w = refs["matrix"][...] if "matrix" in refs else refs["w"][...].astype(refs["x"].dtype)
        w = _zero_from(w, valid, axis=1 if transposed else 0)
        partial = _dot(_zero_from(refs["x"][at], valid, axis=1), w, transposed)
        if steps == 1:
            _finish_y(drop, refs, at, group, partial)
            return
        y_sum = refs["y_sum"]

        @pl.when(step == 0)
        def _() -> None:
            y_sum[at] = partial

        @pl.when(step > 0)
        def _() -> None:
            y_sum[at] += partial

        @pl.when(step == steps - 1)
        def _() -> None:
            _finish_y(drop, refs, at, group, y_sum[at])

    if "matrix" in refs:
        _make_matrix(refs)
    parts = tiles.rows // height
    if tiles.groups * parts == 1:
        work(0, slice(None))
        return

    @pl.loop(0, tiles.groups * parts)
    def _(part: Any) -> None:
        # lax's division is that of numbers that are not negative; the sign of others would be asked of a device.
        first = lax.rem(part, parts) * height
        rows = slice(None) if parts == 1 else pl.ds(pl.multiple_of(first, height), height)
        work(lax.div(part, parts), rows)


def _add_h(
    tiles: Tiles,
    drop: str,
    refs: dict[str, Any],
    at: tuple[Any, Any],
    group: Any,
    step: Any,
    steps: int,
    valid: Any,
) -> None:
    """Adds this step's share of x A for the rows ``at``; after the last, writes h and the scaled h for y's blocks."""
    h_sum = refs["h_sum"]

    @pl.when(step == 0)
    def _() -> None:
        h_sum[at] = jnp.zeros_like(h_sum[at])

    masked = "threshold" in refs and drop == "input"
    width = _MASKED_COLUMNS if masked and tiles.inner % _MASKED_COLUMNS == 0 else tiles.inner

    def add(start: Any) -> None:
        columns = slice(None) if width == tiles.inner else pl.ds(pl.multiple_of(start, width), width)
        z = refs["x"][(*at, columns)]
        if masked:
            kept = keep_bits(refs["row_key"][at], refs["column_key"][at[0], :, columns], refs["threshold"][group])
            z = jnp.where(kept, z, jnp.zeros_like(z))
        left = None if valid is None else valid - start
        a = refs["a"][at[0], :, columns]
        h_sum[at] += _dot(_zero_from(z, left, axis=1), _zero_from(a, left, axis=1), transposed=True)

    if width == tiles.inner:
        add(0)
    else:
        pl.loop(0, tiles.inner, step=width)(add)

    @pl.when(step == steps - 1)
    def _() -> None:
        total = h_sum[at]
        refs["h"][at] = (total * refs["h_factor"][group]).astype(refs["h"].dtype)
        refs["scaled_h"][at] = (total * refs["term_factor"][group]).astype(refs["scaled_h"].dtype)


def _finish_y(
    drop: str, refs: dict[str, Any], at: tuple[Any, Any], group: Any, y: Float[Array, "rows columns"]
) -> None:
    """Adds the low-rank term and the bias to finished rows of x W, and writes them."""
    term = _dot(refs["scaled_h"][at], refs["b"][at[0]], transposed=False)
    if "threshold" in refs and drop == "output":
        kept = keep_bits(refs["row_key"][at], refs["column_key"][at[0]], refs["threshold"][group])
        term = jnp.where(kept, term, 0.0)
    y = y + term
    if "bias" in refs:
        y = y + refs["bias"][...].astype(jnp.float32)
    refs["y"][at] = y.astype(refs["y"].dtype)


def _dot(left: Array, right: Array, transposed: bool) -> Float[Array, "rows columns"]:
    """``left · right`` or ``left · rightᵀ``, summed in float32."""
    return lax.dot_general(
        left, right, (((1,), (1 if transposed else 0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _zero_from(block: Array, valid: Any, axis: int) -> Array:
    """The block with zeros from position ``valid`` on along ``axis``; as it is where valid is None."""
    if valid is None:
        return block
    position = lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(position < valid, block, jnp.zeros_like(block))
