"""What the kernels of triton.py share: tiles of rows, products of tiles, and the random bits of dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout.triton import random_bits, row_key

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter computes products of bfloat16 tiles from their bits, which is wrong."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, total):
    """total + a b, in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_rows(x, start, stride, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr = False):
    """x[start : start + ROWS, :WIDTH]; zeros from row `count` on, unless the tile is known to be FULL."""
    rows = start + tl.arange(0, ROWS)[:, None]
    places = x + (rows.to(tl.int64) * stride + tl.arange(0, WIDTH)[None, :])
    if FULL:
        return tl.load(places)
    return tl.load(places, mask=rows < count, other=0)


@triton.jit
def load_halves(
    x, start, stride, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, FULL: tl.constexpr = False
):
    """x[start : start + ROWS, :WIDTH], with `HALVES` as its left and its right half; else the second one has no use.

    Tensor cores before Hopper take both operands from registers, which do not suffice for those of whole rows.
    """
    if HALVES:
        left = load_rows(x, start, stride, count, ROWS, WIDTH // 2, FULL)
        right = load_rows(x + WIDTH // 2, start, stride, count, ROWS, WIDTH // 2, FULL)
    else:
        left = load_rows(x, start, stride, count, ROWS, WIDTH, FULL)
        right = left
    return left, right


@triton.jit
def zero_halves(ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr):
    """Sums that `add_halves` begins with."""
    if HALVES:
        left = tl.zeros([ROWS, WIDTH // 2], tl.float32)
        right = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    else:
        left = tl.zeros([ROWS, WIDTH], tl.float32)
        right = tl.zeros([1], tl.float32)
    return left, right


@triton.jit
def inner_products(left, right, other_left, other_right, HALVES: tl.constexpr):
    """x y^T of rows x and y."""
    total = dot(left, tl.trans(other_left), tl.zeros([left.shape[0], other_left.shape[0]], tl.float32))
    if HALVES:
        total = dot(right, tl.trans(other_right), total)
    return total


@triton.jit
def add_halves(weights, left, right, sum_left, sum_right, HALVES: tl.constexpr):
    """The sums, with the rows weighted by `weights` added."""
    sum_left = dot(weights, left, sum_left)
    if HALVES:
        sum_right = dot(weights, right, sum_right)
    return sum_left, sum_right


@triton.jit
def load_numbers(x, places, valid, other, FULL: tl.constexpr):
    """One number for each row; `other` where there is no row."""
    if FULL:
        return tl.load(x + places)
    return tl.load(x + places, mask=valid, other=other)


@triton.jit
def store_rows(x, start, count, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """x[start : start + ROWS, :WIDTH] of a dense x [count, WIDTH]."""
    _store(x, start, WIDTH, count, tile, ROWS, WIDTH)


@triton.jit
def store_halves(x, start, count, left, right, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr):
    """What `store_rows` does."""
    if HALVES:
        _store(x, start, WIDTH, count, left, ROWS, WIDTH // 2)
        _store(x + WIDTH // 2, start, WIDTH, count, right, ROWS, WIDTH // 2)
    else:
        _store(x, start, WIDTH, count, left, ROWS, WIDTH)


@triton.jit
def _store(x, start, stride, count, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = start + tl.arange(0, ROWS)[:, None]
    places = rows.to(tl.int64) * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(x + places, tile.to(x.dtype.element_ty), mask=rows < count)


@triton.jit
def row_keys(seed, rows):
    """The random bits of a row follow from its key. `rows` are int64, counted over the batch."""
    return row_key(tl.load(seed), rows)


@triton.jit
def keep(keys, columns, THRESHOLD: tl.constexpr):
    """Which scores dropout keeps; keys of rows and numbers of columns broadcast."""
    return random_bits(keys, columns) >= THRESHOLD
