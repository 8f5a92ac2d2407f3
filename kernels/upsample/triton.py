"""Triton kernels of the upsampling; ../bilinear.py has the geometry, reference.py is the ground truth.

Pixels are handled as tiles [lanes, pixels of a lane], whose last axis a thread reads or writes at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import blend, cell_row, collect, gradient_rows, lanes_for, load_samples, warps_for
from ..launch import Launch

FORWARD_LANES, BACKWARD_LANES = 256, 512
"""Low-resolution columns of a program at most."""
FORWARD_ROWS = 8
"""Low-resolution rows of a program."""
TILE = 4096
THREAD = 16
"""Pixels of a program's tile, and of a thread's part of it, at most: they are held in registers."""

_VARYING = ("candidates", "height", "width", "strips", "tiles")
"""Arguments for whose values nothing is compiled anew."""


@triton.jit
def _place(candidates, strips, tiles):
    """Object and candidate (int64), strip of rows and tile of columns of a program."""
    program = tl.program_id(0)
    plane = (program // tiles // strips).to(tl.int64)
    return plane // candidates, plane % candidates, program // tiles % strips, program % tiles


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x)."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x > 0, larger, smaller), tl.where(x > 0, smaller, larger)


@triton.jit(do_not_specialize=_VARYING)
def upsample_kernel(
    logits, logits_n, logits_m, logits_y, logits_x, out, scale, bias, candidates, height, width, strips, tiles,
    ACTIVATION: tl.constexpr, FACTOR: tl.constexpr, SPAN: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, UNROLL_ROWS: tl.constexpr,
):  # fmt: skip
    """Pixels of `ROWS` low-resolution rows and `LANES` columns; `SPAN` is the power of two that holds `FACTOR`."""
    n, m, strip, tile = _place(candidates, strips, tiles)
    lanes = tile * LANES + tl.arange(0, LANES)
    columns = tl.minimum(lanes, width - 1)
    pixel = tl.arange(0, SPAN)[None, :]
    offset = (2 * pixel + 1 - FACTOR).to(tl.float32) * (0.5 / FACTOR)
    x = lanes[:, None] * FACTOR + pixel
    valid = (lanes < width)[:, None] & (pixel < FACTOR)
    plane = logits + n * logits_n + m * logits_m
    out += (n * candidates + m) * (height * FACTOR) * (width * FACTOR).to(tl.int64)
    first = strip * ROWS
    above, above_left, above_right = load_samples(
        plane, tl.maximum(first - 1, 0), logits_y, logits_x, columns, width, FACTOR
    )
    own, left, right = load_samples(plane, first, logits_y, logits_x, columns, width, FACTOR)
    for y in range(first, tl.minimum(first + ROWS, height)):
        below, below_left, below_right = load_samples(
            plane, tl.minimum(y + 1, height - 1), logits_y, logits_x, columns, width, FACTOR
        )
        for k in tl.range(0, FACTOR, loop_unroll_factor=UNROLL_ROWS):
            place = tl.cast(2 * k + 1 - FACTOR, tl.float32) * (0.5 / FACTOR)
            other = tl.where(place < 0, above, below)
            other_left = tl.where(place < 0, above_left, below_left)
            other_right = tl.where(place < 0, above_right, below_right)
            logit, to_left, to_right = blend(own, left, right, other, other_left, other_right, tl.abs(place), FACTOR)
            value = logit[:, None] + tl.abs(offset) * tl.where(offset < 0, to_left[:, None], to_right[:, None])
            if ACTIVATION == 1:
                value, _ = _sigmoids(value)
            elif ACTIVATION == 2:
                value = tl.where(value > 0, 1.0, 0.0)
            row = out + tl.cast(y * FACTOR + k, tl.int64) * (width * FACTOR)
            tl.store(row + x, (value * scale + bias).to(out.dtype.element_ty), mask=valid)
        above, above_left, above_right = own, left, right
        own, left, right = below, below_left, below_right


@triton.jit(do_not_specialize=_VARYING)
def gradient_kernel(
    grad, grad_n, grad_m, grad_y, grad_x, logits, logits_n, logits_m, logits_y, logits_x,
    gradient, scale, candidates, height, width, strips, tiles,
    ACTIVATION: tl.constexpr, FACTOR: tl.constexpr, SPAN: tl.constexpr,
    LANES: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, UNROLL_ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient [N, M, h, w] of `ROWS` low-resolution rows and `LANES` columns, gathered from the cells between samples.

    The outer `SHARED` columns are computed only for what they owe to their neighbors.
    """
    n, m, strip, tile = _place(candidates, strips, tiles)
    first = strip * ROWS
    last = tl.minimum(first + ROWS, height)
    lane = tl.arange(0, LANES)
    lanes = tile * (LANES - 2 * SHARED) - SHARED + lane
    columns = tl.minimum(tl.maximum(lanes, 0), width - 1)
    owned = (lanes < width) & (lane >= SHARED) & (lane < LANES - SHARED)
    pixel = tl.arange(0, SPAN)[None, :]
    offset = (2 * pixel + 1 - FACTOR).to(tl.float32) * (0.5 / FACTOR)
    x = (columns[:, None] * FACTOR + pixel).to(tl.int64) * grad_x
    plane = logits + n * logits_n + m * logits_m
    out = gradient + (n * candidates + m) * height * width + lanes
    top, top_left, top_right = load_samples(plane, tl.maximum(first - 1, 0), logits_y, logits_x, columns, width, FACTOR)
    low, low_left, low_right = load_samples(plane, first, logits_y, logits_x, columns, width, FACTOR)
    # What the samples above a cell have received: all of it, and the parts owed to the left and to the right.
    total = tl.zeros([LANES], tl.float32)
    leftward = tl.zeros([LANES], tl.float32)
    rightward = tl.zeros([LANES], tl.float32)
    for cell in range(first - 1, last):
        next_low, next_left, next_right = load_samples(
            plane, tl.minimum(cell + 2, height - 1), logits_y, logits_x, columns, width, FACTOR
        )
        low_total = tl.zeros([LANES], tl.float32)
        low_leftward = tl.zeros([LANES], tl.float32)
        low_rightward = tl.zeros([LANES], tl.float32)
        row = grad + n * grad_n + m * grad_m + tl.cast(cell * FACTOR + FACTOR // 2, tl.int64) * grad_y
        for k in tl.range(0, FACTOR, loop_unroll_factor=UNROLL_ROWS):
            weight, on_image, up, down = cell_row(k, cell >= 0, cell + 1 < height, FACTOR)
            slope = tl.load(row + x, mask=on_image & (pixel < FACTOR), other=0.0).to(tl.float32) * scale
            if ACTIVATION == 1:
                logit, to_left, to_right = blend(top, top_left, top_right, low, low_left, low_right, weight, FACTOR)
                value = logit[:, None] + tl.abs(offset) * tl.where(offset < 0, to_left[:, None], to_right[:, None])
                p, other = _sigmoids(value)
                slope *= p * other
            row_total = tl.sum(slope, axis=1)
            row_leftward = tl.sum(tl.where(offset < 0, -offset * slope, 0.0), axis=1)
            row_rightward = tl.sum(tl.where(offset < 0, 0.0, offset * slope), axis=1)
            total += up * row_total
            leftward += up * row_leftward
            rightward += up * row_rightward
            if FACTOR > 1:  # else `down` is 0, and 0 times NaN would reach the row below
                low_total += down * row_total
                low_leftward += down * row_leftward
                low_rightward += down * row_rightward
            row += grad_y
        if cell >= first:
            result = collect(total, leftward, rightward, lanes, width, FACTOR)
            tl.store(out + tl.cast(cell, tl.int64) * width, result.to(gradient.dtype.element_ty), mask=owned)
        total, leftward, rightward = low_total, low_leftward, low_rightward
        top, top_left, top_right = low, low_left, low_right
        low, low_left, low_right = next_low, next_left, next_right


def upsample(logits: Tensor, factor: int, activation: int, scale: float, bias: float, dtype: torch.dtype) -> Tensor:
    """See `reference.upsample`."""
    launch = upsample_launch(logits, factor, activation, scale, bias, dtype)
    launch.run()
    return launch.arguments["out"]


def upsample_backward(grad: Tensor, logits: Tensor, factor: int, activation: int, scale: float) -> Tensor:
    """See `reference.upsample_backward`."""
    if activation == 2:
        return logits.new_zeros(logits.shape)
    launch = gradient_launch(grad, logits, factor, activation, scale)
    launch.run()
    return launch.arguments["gradient"]


def upsample_launch(
    logits: Tensor, factor: int, activation: int, scale: float, bias: float, dtype: torch.dtype
) -> Launch:
    """Leaves `out` [N, M, factor h, factor w]."""
    n, m, height, width = logits.shape
    inputs, lanes, warps = _inputs(logits, factor, activation, scale, FORWARD_LANES)
    strips, tiles = triton.cdiv(height, FORWARD_ROWS), triton.cdiv(width, lanes)
    arguments = inputs | {
        "out": logits.new_empty((n, m, factor * height, factor * width), dtype=dtype),
        "bias": bias,
        "strips": strips,
        "tiles": tiles,
        "ROWS": FORWARD_ROWS,
    }
    return Launch(upsample_kernel, n * m * strips * tiles, arguments, warps)


def gradient_launch(grad: Tensor, logits: Tensor, factor: int, activation: int, scale: float) -> Launch:
    """Leaves `gradient` [N, M, h, w]."""
    n, m, height, width = logits.shape
    inputs, lanes, warps = _inputs(logits, factor, activation, scale, BACKWARD_LANES)
    shared = int(width > lanes)
    tiles = triton.cdiv(width, lanes - 2 * shared)
    rows = gradient_rows(n * m * tiles, height)
    strips = triton.cdiv(height, rows)
    arguments = inputs | {
        "grad": grad,
        **{f"grad_{axis}": stride for axis, stride in zip("nmyx", grad.stride(), strict=True)},
        "gradient": logits.new_empty((n, m, height, width)),
        "strips": strips,
        "tiles": tiles,
        "SHARED": shared,
        "ROWS": rows,
    }
    return Launch(gradient_kernel, n * m * strips * tiles, arguments, warps)


def _inputs(logits: Tensor, factor: int, activation: int, scale: float, most_lanes: int) -> tuple[dict, int, int]:
    """Arguments of both kernels, lanes and warps of a program."""
    span = triton.next_power_of_2(factor)
    lanes = lanes_for(logits.shape[3], min(most_lanes, max(TILE // span, 4)))
    arguments = {
        "logits": logits,
        **{f"logits_{axis}": stride for axis, stride in zip("nmyx", logits.stride(), strict=True)},
        "scale": scale,
        "candidates": logits.shape[1],
        "height": logits.shape[2],
        "width": logits.shape[3],
        "ACTIVATION": activation,
        "FACTOR": factor,
        "SPAN": span,
        "LANES": lanes,
        "UNROLL_ROWS": factor if factor <= 4 else 1,
    }
    return arguments, lanes, max(warps_for(lanes, factor), lanes * span // (32 * THREAD))
