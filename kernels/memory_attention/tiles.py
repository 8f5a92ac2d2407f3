"""What the kernels of triton.py share: rotated tiles, products of tiles, and the random bits of dropout.

A tile of rows is held as its even and its odd channels, the two halves of every rotated pair. A product over channels
is the sum of the products of the halves, so the pairs are only joined again where gradients are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter computes products of bfloat16 tiles from their bits, which is wrong."""

GOLDEN = tl.constexpr(0x9E3779B9)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, total):
    """total + a b, in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_rows(x, start, stride, count, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """x[start : start + ROWS, :WIDTH]; zeros from row `count` on."""
    rows = start + tl.arange(0, ROWS)[:, None]
    places = rows.to(tl.int64) * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + places, mask=rows < count, other=0)


@triton.jit
def load_angles(
    cos, sin, start, positions, rotated, ROWS: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr = 0, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Cosines and sines of rows of a sequence that repeats a grid of `positions`; no rotation from `rotated` on."""
    rows = start + tl.arange(0, ROWS)
    places = (rows % positions)[:, None] * HALF + FIRST + tl.arange(0, HALF // PARTS)[None, :]
    mask = rows[:, None] < rotated
    return tl.load(cos + places, mask=mask, other=1.0), tl.load(sin + places, mask=mask, other=0.0)


@triton.jit
def load_rotated(
    x, start, stride, count, cos, sin, positions, rotated,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Even and odd channels [ROWS, WIDTH / 2] of rows, rotated in float32 and rounded to the dtype of x."""
    even, odd = tl.split(tl.reshape(load_rows(x, start, stride, count, ROWS, WIDTH), [ROWS, WIDTH // 2, 2]))
    if ROTATE:
        c, s = load_angles(cos, sin, start, positions, rotated, ROWS, WIDTH // 2)
        a, b = even.to(tl.float32), odd.to(tl.float32)
        # Sums of pairs, since Triton moves elementwise arithmetic into the layout of the products' operands, where
        # every warp would repeat it.
        even = tl.sum(tl.join(a * c, -b * s), 2).to(x.dtype.element_ty)
        odd = tl.sum(tl.join(a * s, b * c), 2).to(x.dtype.element_ty)
    return even, odd


@triton.jit
def store_rows(
    x, start, count, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr = 0, PARTS: tl.constexpr = 1
):
    """x[start : start + ROWS, FIRST : FIRST + WIDTH / PARTS] of a dense x [count, WIDTH]."""
    rows = start + tl.arange(0, ROWS)[:, None]
    places = rows.to(tl.int64) * WIDTH + FIRST + tl.arange(0, WIDTH // PARTS)[None, :]
    tl.store(x + places, tile.to(x.dtype.element_ty), mask=rows < count)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def store_part(
    even, odd, x, start, count, cos, sin, positions, rotated,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    if ROTATE:
        c, s = load_angles(cos, sin, start, positions, rotated, ROWS, WIDTH // 2, FIRST // 2, PARTS)
        even, odd = even * c + odd * s, odd * c - even * s
    joined = tl.reshape(tl.join(even, odd), [ROWS, WIDTH // PARTS])
    store_rows(x, start, count, joined, ROWS, WIDTH, FIRST, PARTS)


@triton.jit
def store_rotated_back(
    even, odd, x, start, count, cos, sin, positions, rotated,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Rows of a dense x from the gradient of rotated rows, by the transposed rotation: that by the negative angle.

    In four parts, one after the other, since all at once needs more registers than there are.
    """
    QUARTER: tl.constexpr = WIDTH // 4
    even_left, even_right = halves(even, ROWS, WIDTH // 2)
    odd_left, odd_right = halves(odd, ROWS, WIDTH // 2)
    even_0, even_1 = halves(even_left, ROWS, QUARTER)
    odd_0, odd_1 = halves(odd_left, ROWS, QUARTER)
    even_2, even_3 = halves(even_right, ROWS, QUARTER)
    odd_2, odd_3 = halves(odd_right, ROWS, QUARTER)
    store_part(even_0, odd_0, x, start, count, cos, sin, positions, rotated, ROWS, WIDTH, ROTATE, 0, 4)
    store_part(even_1, odd_1, x, start, count, cos, sin, positions, rotated, ROWS, WIDTH, ROTATE, QUARTER, 4)
    store_part(even_2, odd_2, x, start, count, cos, sin, positions, rotated, ROWS, WIDTH, ROTATE, 2 * QUARTER, 4)
    store_part(even_3, odd_3, x, start, count, cos, sin, positions, rotated, ROWS, WIDTH, ROTATE, 3 * QUARTER, 4)


@triton.jit
def after_loop(remaining):
    """0, from what a loop counted down to 0 or below: addresses that add it are not kept in registers before."""
    return tl.maximum(remaining, 0)


@triton.jit
def mix(x):
    """A permutation of uint32 whose every output bit depends on every input bit."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def row_keys(seed, rows):
    """The random bits of a row follow from its key. `rows` are int64, counted over the batch."""
    value = tl.load(seed)
    return mix(mix(value.to(tl.uint32) ^ rows.to(tl.uint32)) + (value >> 32).to(tl.uint32))


@triton.jit
def keep(keys, columns, THRESHOLD: tl.constexpr):
    """Which scores dropout keeps; keys of rows and numbers of columns broadcast."""
    return mix(keys + columns.to(tl.uint32) * GOLDEN) >= THRESHOLD
