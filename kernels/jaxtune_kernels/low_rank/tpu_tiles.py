"""Tiles of the TPU kernel: what a choice of them costs in on-chip memory and in traffic, and the best one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

MIB = 2**20

VMEM_BUDGET = 40 * MIB
"""Most that the blocks and temporaries of one core may take. A v5p core has 64 MiB, v5e and v6e have 128 MiB; the rest
is left to the compiler's own scratch and to what XLA keeps on chip around the kernel."""

VMEM_LIMIT = 56 * MIB
"""What the compiler is told it may use: its count and ours differ by how it spills."""

_ROWS = (1024, 512, 256, 128)
_COLUMNS = (2048, 1024, 512, 256, 128)
_INNER = (4096, 2048, 1024, 512)

# Multiply-adds that are unrolled at once: 512 rows × 1,024 × 1,024. More would make the program itself large.
_UNROLLED = 2**29

# What a step of the grid costs beside its traffic (0.35 µs, a usual figure for a Pallas grid step on TPU) at the 0.8
# GB/ms of a v5e's memory. It only keeps tiles from shrinking for nothing.
_STEP_BYTES = 300_000


class Problem(NamedTuple):
    """The shape of a launch: groups, rows of each, inner size, columns, rank; bytes of an entry of x and of W."""

    g: int
    m: int
    k: int
    n: int
    r: int
    x_bytes: int
    w_bytes: int
    dropout: bool = False


class Tiles(NamedTuple):
    """One step's share: ``groups`` adapters, ``rows`` of each, ``columns`` of y, ``inner`` of the contracted size."""

    groups: int
    rows: int
    columns: int
    inner: int

    @property
    def rows_at_once(self) -> int:
        """Rows that are worked on at once: a block of many rows is a loop over some of them."""
        parts = 1
        while (
            self.rows * self.columns * self.inner > parts * _UNROLLED
            and self.rows % (2 * parts * 32) == 0
            and self.rows >= 2 * parts * 256
        ):
            parts *= 2
        return self.rows // parts

    def grid(self, problem: Problem) -> tuple[int, int, int, int]:
        """Blocks of groups, rows, columns, inner; the last runs fastest."""
        sizes = (problem.g, problem.m, problem.n, problem.k)
        return tuple(math.ceil(size / tile) for size, tile in zip(sizes, self, strict=True))  # pyright: ignore[reportReturnType]


def choose_tiles(problem: Problem) -> Tiles:
    """The tiles that move the fewest bytes among those that fit :data:`VMEM_BUDGET`.

    Rows: W is read once for each block of rows, so a block has up to 1,024 (2,048 flops for each entry of W, above the
    ridge of every TPU to v6e); where one adapter has fewer, several adapters share a block. Inner and columns: x is
    read once if a block holds all of K or all of N, which is taken where it fits.
    """
    fitting = [tiles for tiles in _candidates(problem) if vmem_bytes(problem, tiles) <= VMEM_BUDGET]
    # A size without a divisor that fits leaves the smallest candidate, and the compiler the last word.
    fitting = fitting or [min(_candidates(problem), key=lambda tiles: vmem_bytes(problem, tiles))]
    return min(fitting, key=lambda tiles: hbm_bytes(problem, tiles) + _STEP_BYTES * math.prod(tiles.grid(problem)))


def hbm_bytes(problem: Problem, tiles: Tiles) -> int:
    """Bytes that a launch moves between the chip's memory and its blocks: a block is fetched when its index changes.

    ``cost_analysis`` of a compiled program does not look into a kernel; this is the count that stands for it.
    """
    g, m, k, n, r = problem[:5]
    groups, rows, columns, inner = tiles.grid(problem)
    x = g * m * k * problem.x_bytes * (columns if inner > 1 else 1)
    w = k * n * problem.w_bytes * (groups * rows if columns * inner > 1 else 1)
    # A is used during the first block of columns only, and stays where it is for the others.
    a = g * k * r * problem.x_bytes * (rows if inner > 1 else 1)
    b = g * r * n * problem.x_bytes * (rows if columns > 1 else 1)
    y = g * m * n * problem.x_bytes
    h = g * m * _padded(r, 128) * problem.x_bytes
    # A word a row, which takes a line of 128 words.
    words = g * m * 128 * 4 if problem.dropout else 0
    return x + w + a + b + y + h + words


def vmem_bytes(problem: Problem, tiles: Tiles) -> int:
    """On-chip bytes of a step: two buffers of each block, scratch, and the float32 temporaries of a block of y."""
    groups, rows, columns, inner = tiles
    size, r = problem.x_bytes, problem.r
    blocks = (
        groups * _tile(rows, inner, size)  # x
        + _tile(inner, columns, problem.w_bytes)  # W
        + groups * (_tile(r, inner, size) + _tile(r, columns, size))  # A, B
        + groups * (_tile(rows, columns, size) + _tile(rows, r, size))  # y, h
    )
    blocks += _tile(1, columns, 4)  # bias
    if problem.dropout:
        blocks += groups * (_tile(rows, 1, 4) + _tile(1, max(inner, columns), 4))  # words of rows and columns
    scratch = groups * (_tile(rows, r, size) + _tile(rows, r, 4))
    if inner < problem.k:
        scratch += groups * _tile(rows, columns, 4)
    # The sum, the low-rank term and, with dropout, its mask; W once more where it is cast.
    temporaries = (3 if problem.dropout else 2) * _tile(tiles.rows_at_once, columns, 4)
    if problem.w_bytes != problem.x_bytes:
        temporaries += _tile(inner, columns, size)
    return 2 * blocks + scratch + temporaries


def _candidates(problem: Problem) -> Iterator[Tiles]:
    groups = {1} if problem.m > _ROWS[0] // 2 else {d for d in range(1, problem.g + 1) if problem.g % d == 0}
    inners = [problem.k, *(size for size in _INNER if size < problem.k and problem.k % size == 0)]
    if len(inners) == 1:
        inners += [_balanced(problem.k, size, 128) for size in _INNER if size < problem.k]
    for rows in {_balanced(problem.m, size, 32) for size in _ROWS}:
        for count in groups:
            if count > 1 and (rows < problem.m or count * rows > _ROWS[0]):
                continue
            for columns in {problem.n, *(_balanced(problem.n, size, 128) for size in _COLUMNS)}:
                for inner in inners:
                    yield Tiles(count, rows, columns, inner)


def _balanced(size: int, tile: int, multiple: int) -> int:
    """``tile`` or less, so that blocks are about equally full: the whole size, or a multiple of what hardware wants."""
    if size <= tile:
        return size
    return _padded(math.ceil(size / math.ceil(size / tile)), multiple)


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _tile(rows: int, columns: int, size: int) -> int:
    """Bytes of a block on chip, where memory comes in tiles of 8 (float32) or 16 (bfloat16) rows by 128 columns."""
    return _padded(rows, 32 // size) * _padded(columns, 128) * size
