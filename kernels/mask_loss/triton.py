"""Triton kernels of the mask loss. Formulas: README.md; geometry: ../bilinear.py; the ground truth is reference.py.

The pixels of a lane are worked on one after the other and never leave registers; one load brings the targets of all
pixels of a lane in a row, where their layout allows. Programs of the candidates of an object follow each other, so that
they find its target in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import blend, collect, gradient_rows, lanes_for, load_samples, warps_for
from ..launch import Launch
from .rows import add_row, differentiate_cell

FORWARD_LANES, BACKWARD_LANES = 256, 512
"""Low-resolution columns of a program at most. Neighbors share two columns backward, which wide programs make cheap."""
FORWARD_ROWS = 32
"""Full-resolution rows of a program, in whole low-resolution rows. The last bits of the sums depend on it."""

_VARYING = ("candidates", "height", "width", "blocks", "tiles")
"""Arguments for whose values nothing is compiled anew."""


@triton.jit
def _place(candidates, blocks):
    """Object (int64), candidate and block of a program; candidates are next to each other."""
    program = tl.program_id(0)
    return (program // candidates // blocks).to(tl.int64), program % candidates, program // candidates % blocks


@triton.jit(do_not_specialize=_VARYING)
def sums_kernel(
    logits, logits_n, logits_m, logits_y, logits_x,
    targets, targets_n, targets_y, targets_x,
    sums, counts, candidates, height, width, blocks, tiles, gamma, foreground, background,
    GAMMA: tl.constexpr, FACTOR: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, UNROLL_ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums and counts of `ROWS` low-resolution rows and `LANES` columns of a mask: float32, int32 [N, M, blocks, 3]."""
    n, m, block = _place(candidates, blocks)
    first = block // tiles * ROWS
    lanes = block % tiles * LANES + tl.arange(0, LANES)
    columns = tl.minimum(lanes, width - 1)
    plane = logits + n * logits_n + m.to(tl.int64) * logits_m
    above, above_left, above_right = load_samples(
        plane, tl.maximum(first - 1, 0), logits_y, logits_x, columns, width, FACTOR
    )
    own, left, right = load_samples(plane, first, logits_y, logits_x, columns, width, FACTOR)
    focal_inside = tl.zeros([LANES], tl.float32)
    focal_outside = tl.zeros([LANES], tl.float32)
    p_inside = tl.zeros([LANES], tl.float32)
    p_outside = tl.zeros([LANES], tl.float32)
    wrong = tl.zeros([LANES], tl.int32)
    missed = tl.zeros([LANES], tl.int32)
    target = tl.zeros([LANES], tl.int32)
    # Not a constant: adding a constant under a condition compiles to two additions.
    one = tl.minimum(candidates, 1)
    for y in range(first, tl.minimum(first + ROWS, height)):
        below, below_left, below_right = load_samples(
            plane, tl.minimum(y + 1, height - 1), logits_y, logits_x, columns, width, FACTOR
        )
        truth = targets + n * targets_n + tl.cast(y * FACTOR, tl.int64) * targets_y
        for k in tl.range(0, FACTOR, loop_unroll_factor=UNROLL_ROWS):
            offset = tl.cast(2 * k + 1 - FACTOR, tl.float32) * (0.5 / FACTOR)
            other = tl.where(offset < 0, above, below)
            other_left = tl.where(offset < 0, above_left, below_left)
            other_right = tl.where(offset < 0, above_right, below_right)
            logit, to_left, to_right = blend(own, left, right, other, other_left, other_right, tl.abs(offset), FACTOR)
            focal_inside, focal_outside, p_inside, p_outside, wrong, missed, target = add_row(
                logit, to_left, to_right, truth, columns, targets_x, one, gamma,
                focal_inside, focal_outside, p_inside, p_outside, wrong, missed, target,
                GAMMA, FACTOR, PACKED, WORDS, UNROLL,
            )  # fmt: skip
            truth += targets_y
        above, above_left, above_right = own, left, right
        own, left, right = below, below_left, below_right

    out = ((n * candidates + m) * blocks + block) * 3
    valid = lanes < width
    focal = foreground * focal_inside + background * focal_outside
    tl.store(sums + out, tl.sum(tl.where(valid, focal, 0.0)))
    tl.store(sums + out + 1, tl.sum(tl.where(valid, p_inside + p_outside, 0.0)))
    tl.store(sums + out + 2, tl.sum(tl.where(valid, p_inside, 0.0)))
    tl.store(counts + out, tl.sum(tl.where(valid, target - missed, 0)))
    tl.store(counts + out + 1, tl.sum(tl.where(valid, target - missed + wrong - missed, 0)))
    tl.store(counts + out + 2, tl.sum(tl.where(valid, target, 0)))


@triton.jit(do_not_specialize=_VARYING)
def gradient_kernel(
    slopes, logits, logits_n, logits_m, logits_y, logits_x,
    targets, targets_n, targets_y, targets_x,
    gradient, candidates, height, width, blocks, tiles, gamma, foreground, background,
    GAMMA: tl.constexpr, FACTOR: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr,
    LANES: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    UNROLL_ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradient [N, M, h, w] of `ROWS` low-resolution rows and `LANES` columns, gathered from the cells between samples.

    The outer `SHARED` columns are computed only for what they owe to their neighbors.
    """
    n, m, block = _place(candidates, blocks)
    first = block // tiles * ROWS
    last = tl.minimum(first + ROWS, height)
    lane = tl.arange(0, LANES)
    lanes = block % tiles * (LANES - 2 * SHARED) - SHARED + lane
    columns = tl.minimum(tl.maximum(lanes, 0), width - 1)
    owned = (lanes < width) & (lane >= SHARED) & (lane < LANES - SHARED)
    place = n * candidates + m
    out = gradient + place * height * width + lanes
    focal_slope = tl.load(slopes + place * 3)
    p_slope = tl.load(slopes + place * 3 + 1)
    p_inside_slope = tl.load(slopes + place * 3 + 2)
    if (focal_slope == 0) & (p_slope == 0) & (p_inside_slope == 0):
        # A candidate that was not chosen, or an absent object.
        for y in range(first, last):
            tl.store(out + tl.cast(y, tl.int64) * width, tl.zeros([LANES], gradient.dtype.element_ty), mask=owned)
    else:
        focal_inside, focal_outside = -focal_slope * foreground, focal_slope * background
        p_inside, p_outside = p_slope + p_inside_slope, p_slope
        plane = logits + n * logits_n + m.to(tl.int64) * logits_m
        top, top_left, top_right = load_samples(
            plane, tl.maximum(first - 1, 0), logits_y, logits_x, columns, width, FACTOR
        )
        low, low_left, low_right = load_samples(plane, first, logits_y, logits_x, columns, width, FACTOR)
        # What the row at the top of a cell has received: all of it, and the parts owed to the left and to the right.
        total = tl.zeros([LANES], tl.float32)
        leftward = tl.zeros([LANES], tl.float32)
        rightward = tl.zeros([LANES], tl.float32)
        for cell in range(first - 1, last):
            next_low, next_left, next_right = load_samples(
                plane, tl.minimum(cell + 2, height - 1), logits_y, logits_x, columns, width, FACTOR
            )
            truth = targets + n * targets_n + tl.cast(cell * FACTOR + FACTOR // 2, tl.int64) * targets_y
            total, leftward, rightward, low_total, low_leftward, low_rightward = differentiate_cell(
                top, top_left, top_right, low, low_left, low_right, total, leftward, rightward,
                cell >= 0, cell + 1 < height, truth, columns, targets_y, targets_x, gamma,
                focal_inside, focal_outside, p_inside, p_outside,
                GAMMA, FACTOR, PACKED, WORDS, UNROLL_ROWS, UNROLL,
            )  # fmt: skip
            if cell >= first:
                result = collect(total, leftward, rightward, lanes, width, FACTOR)
                tl.store(out + tl.cast(cell, tl.int64) * width, result.to(gradient.dtype.element_ty), mask=owned)
            total, leftward, rightward = low_total, low_leftward, low_rightward
            top, top_left, top_right = low, low_left, low_right
            low, low_left, low_right = next_low, next_left, next_right


def mask_sums(logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
    """See `reference.mask_sums`."""
    launch = sums_launch(logits, targets, packed, gamma, alpha)
    launch.run()
    return launch.arguments["sums"].sum(2), launch.arguments["counts"].sum(2, dtype=torch.int64)


def mask_sums_backward(
    grad_sums: Tensor, logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float
) -> Tensor:
    """See `reference.mask_sums_backward`."""
    launch = gradient_launch(grad_sums, logits, targets, packed, gamma, alpha)
    launch.run()
    return launch.arguments["gradient"]


def sums_launch(logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float) -> Launch:
    """Leaves `sums` and `counts` [N, M, blocks, 3] of `sums_kernel`, to be added up over blocks."""
    n, m, height, width = logits.shape
    factor = targets.shape[1] // height
    lanes = lanes_for(width, FORWARD_LANES)
    tiles = triton.cdiv(width, lanes)
    rows = max(1, FORWARD_ROWS // factor)
    blocks = tiles * triton.cdiv(height, rows)
    arguments = _inputs(logits, targets, packed, gamma, alpha) | {
        "sums": logits.new_empty((n, m, blocks, 3), dtype=torch.float32),
        "counts": logits.new_empty((n, m, blocks, 3), dtype=torch.int32),
        "blocks": blocks,
        "tiles": tiles,
        "LANES": lanes,
        "ROWS": rows,
    }
    return Launch(sums_kernel, n * m * blocks, arguments, warps_for(lanes, factor))


def gradient_launch(
    grad_sums: Tensor, logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float
) -> Launch:
    """Leaves `gradient` [N, M, h, w]."""
    n, m, height, width = logits.shape
    factor = targets.shape[1] // height
    lanes = lanes_for(width, BACKWARD_LANES)
    shared = int(width > lanes)
    tiles = triton.cdiv(width, lanes - 2 * shared)
    rows = gradient_rows(n * m * tiles, height)
    blocks = tiles * triton.cdiv(height, rows)
    arguments = _inputs(logits, targets, packed, gamma, alpha) | {
        "slopes": grad_sums.contiguous(),
        "gradient": logits.new_empty((n, m, height, width)),
        "blocks": blocks,
        "tiles": tiles,
        "LANES": lanes,
        "SHARED": shared,
        "ROWS": rows,
    }
    return Launch(gradient_kernel, n * m * blocks, arguments, warps_for(lanes, factor))


def _inputs(logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float) -> dict:
    """Arguments of both kernels."""
    factor = targets.shape[1] // logits.shape[2]
    targets, words = _as_words(targets, packed, factor)
    return {
        "logits": logits,
        **{f"logits_{axis}": stride for axis, stride in zip("nmyx", logits.stride(), strict=True)},
        "targets": targets,
        **{f"targets_{axis}": stride for axis, stride in zip("nyx", targets.stride(), strict=True)},
        "candidates": logits.shape[1],
        "height": logits.shape[2],
        "width": logits.shape[3],
        "gamma": gamma,
        "foreground": alpha if alpha >= 0 else 1.0,
        "background": 1.0 - alpha if alpha >= 0 else 1.0,
        "GAMMA": int(gamma) if gamma in (0.0, 1.0, 2.0) else -1,
        "FACTOR": factor,
        "PACKED": packed,
        "WORDS": words,
        "UNROLL_ROWS": factor if factor <= 4 else 1,
        "UNROLL": 4 if factor % 4 == 0 else factor if factor < 8 else 1,
    }


def _as_words(targets: Tensor, packed: bool, factor: int) -> tuple[Tensor, bool]:
    """The targets, and whether one element of them now has all pixels of a lane in a row."""
    if packed:
        return targets, 8 % factor == 0
    targets = targets.view(torch.uint8)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(factor)
    aligned = all(
        place % factor == 0 for place in (targets.data_ptr(), targets.storage_offset(), *targets.stride()[:2])
    )
    if word is None or targets.stride(2) != 1 or not aligned:
        return targets, False
    return targets.view(word), True
