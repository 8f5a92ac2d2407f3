"""Bilinear upsampling by a whole factor inside Triton kernels (align_corners=False); csrc/bilinear.h is the CPU form.

A lane owns one low-resolution column, its sample, and the `FACTOR` full-resolution pixels around it. Pixels before the
sample lie between it and its left neighbor, the others between it and the right one; at the borders the neighbor is the
sample itself. So the bytes of a row of pixels are read in order, and a row of pixels needs three values of each lane.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_samples(plane, row, stride_y, stride_x, columns, width, FACTOR: tl.constexpr):
    """Samples of a low-resolution row in float32, and the steps from them to their left and right neighbors.

    `columns` lie on the image.
    """
    samples = plane + tl.cast(row, tl.int64) * stride_y
    own = tl.load(samples + columns.to(tl.int64) * stride_x).to(tl.float32)
    left, right = own, own
    if FACTOR > 1:
        left = tl.load(samples + tl.maximum(columns - 1, 0).to(tl.int64) * stride_x).to(tl.float32)
        right = tl.load(samples + tl.minimum(columns + 1, width - 1).to(tl.int64) * stride_x).to(tl.float32)
    return own, left - own, right - own


@triton.jit
def blend(a, a_left, a_right, b, b_left, b_right, weight, FACTOR: tl.constexpr):
    """`load_samples` of a row between rows a and b: (1 - weight) a + weight b, exact where they are equal."""
    if FACTOR > 1:
        a += weight * (b - a)
        a_left += weight * (b_left - a_left)
        a_right += weight * (b_right - a_right)
    return a, a_left, a_right


@triton.jit
def cell_row(index, has_top, has_low, FACTOR: tl.constexpr):
    """Row `index` of the `FACTOR` rows of a cell, which lies between two rows of samples: the weight of the lower
    samples in it, whether it is on the image, and what of its gradient the upper and the lower samples receive.

    `has_top`, `has_low` are False beyond a border: half of the cell is not there, the other half belongs to one row of
    samples alone.
    """
    weight = tl.cast(2 * index + 1 - FACTOR % 2, tl.float32) * (0.5 / FACTOR)
    nearer_top = index < FACTOR - FACTOR // 2
    both = tl.where(has_top & has_low, 1.0, 0.0)
    to_top = both * (1.0 - weight) + tl.where(nearer_top, tl.where(has_low, 0.0, 1.0), 0.0)
    to_low = both * weight + tl.where(nearer_top, 0.0, tl.where(has_top, 0.0, 1.0))
    return weight, tl.where(nearer_top, has_top, has_low), to_top, to_low


@triton.jit
def collect(total, leftward, rightward, lanes, width, FACTOR: tl.constexpr):
    """Gradient of each lane's sample from what all lanes owe: `total`, with its parts for the neighbors on both sides.

    `lanes` are consecutive columns; the first and the last lane are right only at the borders.
    """
    if FACTOR > 1:
        lane = tl.arange(0, lanes.shape[0])
        from_left = tl.gather(rightward, tl.maximum(lane - 1, 0), 0)
        from_right = tl.gather(leftward, tl.minimum(lane + 1, lanes.shape[0] - 1), 0)
        # At a border the neighbor is the sample itself.
        received = tl.where(lanes > 0, from_left, leftward) + tl.where(lanes < width - 1, from_right, rightward)
        total += received - leftward - rightward
    return total


def lanes_for(width: int, most: int) -> int:
    """Lanes of a program on `width` low-resolution columns: a power of two of at least a warp."""
    return min(max(triton.next_power_of_2(width), 32), most)


def warps_for(lanes: int, factor: int) -> int:
    """A thread takes four pixels of a row, but one whole column at least."""
    return max(1, lanes // (32 * max(1, 4 // factor)))


def gradient_rows(programs: int, height: int) -> int:
    """Low-resolution rows of a program that gathers gradients, of which each two share a row of cells: as many as
    leave enough programs, `programs` for each group of rows. The results do not depend on it."""
    enough = (rows for rows in (32, 16, 8) if programs * triton.cdiv(height, rows) >= 1024)
    return next(enough, 4)
