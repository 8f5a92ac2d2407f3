"""Triton loops over one full-resolution row of the mask loss: sums and slopes; csrc/rows.cpp is the CPU form.

Every lane has `FACTOR` pixels of the row. Formulas and their numerics: README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..bilinear import blend, cell_row

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def reciprocal(x):
    """1 / x with an error of one unit in the last place; a division takes six instructions and may be off by two."""
    if INTERPRETED:
        y = 1.0 / x  # the interpreter has no inline assembly
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def classify(x, inside, gamma, GAMMA: tl.constexpr):
    """With z the logit of the true class: is its sign wrong; sigmoid(-z), sigmoid(z), softplus(-z), sigmoid(-z)^gamma.

    GAMMA is 0, 1, 2, or -1 for any other exponent.
    """
    magnitude = tl.abs(x)
    e = tl.exp2(magnitude * -1.4426950408889634)
    larger = reciprocal(1.0 + e)
    smaller = e * larger
    # log(1 + e) / e on 0 to 1, relative error 4e-8, exact at 0.
    log1p = e * 0.005364824552088976 - 0.030065791681408882
    log1p = log1p * e + 0.07920453697443008
    log1p = log1p * e - 0.13753803074359894
    log1p = log1p * e + 0.191536545753479
    log1p = log1p * e - 0.24857163429260254
    log1p = log1p * e + 0.3332132399082184
    log1p = log1p * e - 0.49999648332595825
    log1p = (log1p * e + 1.0) * e
    wrong = (x > 0) != inside
    q = tl.where(wrong, larger, smaller)
    p_true = tl.where(wrong, smaller, larger)
    loss = tl.where(wrong, log1p + magnitude, log1p)
    if GAMMA == 0:
        power = tl.full(x.shape, 1.0, tl.float32)
    elif GAMMA == 1:
        power = q
    elif GAMMA == 2:
        power = q * q
    else:
        # From log(q) = -softplus(z): finite, with its gradient, also where q has underflowed.
        power = tl.exp2(tl.where(wrong, log1p, log1p + magnitude) * (gamma * -1.4426950408889634))
    return wrong, q, p_true, loss, power


@triton.jit
def logit_slope(q, p_true, loss, power, focal, p, gamma, GAMMA: tl.constexpr):
    """Gradient of the logit from what `classify` returns; `focal` and `p` are the slopes of a pixel of its class."""
    if GAMMA == 0:
        slope = q * (focal + p * p_true)
    elif GAMMA == 1:
        slope = q * (focal * (q + p_true * loss) + p * p_true)
    elif GAMMA == 2:
        slope = q * (focal * q * (q + 2.0 * (p_true * loss)) + p * p_true)
    else:
        slope = focal * power * (q + gamma * (p_true * loss)) + p * (q * p_true)
    return slope


@triton.jit
def load_word(row, columns, stride, on_image, FACTOR: tl.constexpr, PACKED: tl.constexpr):
    """The targets of all pixels of each lane in one load: a byte for a pixel, with PACKED a bit, lowest first."""
    if PACKED:
        first = columns * FACTOR
        byte = tl.load(row + (first >> 3).to(tl.int64) * stride, mask=on_image, other=0)
        word = byte.to(tl.int32) >> (first & 7)
    else:
        word = tl.load(row + columns, mask=on_image, other=0)
    return word


@triton.jit
def load_pixel(row, columns, index, stride, on_image, FACTOR: tl.constexpr, PACKED: tl.constexpr):
    """Whether pixel `index` of each lane is in the target, by a load of its own."""
    pixel = columns * FACTOR + index
    if PACKED:
        byte = tl.load(row + (pixel >> 3).to(tl.int64) * stride, mask=on_image, other=0)
        inside = ((byte.to(tl.int32) >> (pixel & 7)) & 1) != 0
    else:
        inside = tl.load(row + pixel.to(tl.int64) * stride, mask=on_image, other=0) != 0
    return inside


@triton.jit
def add_row(
    logit, to_left, to_right, truth, columns, stride, one, gamma,
    focal_inside, focal_outside, p_inside, p_outside, wrong_pixels, missed_pixels, target_pixels,
    GAMMA: tl.constexpr, FACTOR: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums, and counts of wrong pixels, of those inside the target, and of the target, with a row added.

    `logit`, `to_left`, `to_right` are a row as `bilinear.load_samples` returns it.
    `truth` is the row of the targets, which has all pixels of a lane in one element with WORDS; `one` is 1.
    """
    BITS: tl.constexpr = 1 if PACKED else 8
    word = load_word(truth, columns, stride, True, FACTOR, PACKED) if WORDS else columns
    for r in tl.range(0, FACTOR, loop_unroll_factor=UNROLL):
        if WORDS:
            inside = ((word >> (r * BITS)) & ((1 << BITS) - 1)) != 0
        else:
            inside = load_pixel(truth, columns, r, stride, True, FACTOR, PACKED)
        offset = tl.cast(2 * r + 1 - FACTOR, tl.float32) * (0.5 / FACTOR)
        x = logit + tl.abs(offset) * tl.where(offset < 0, to_left, to_right)
        wrong, q, p_true, loss, power = classify(x, inside, gamma, GAMMA)
        focal = power * loss
        focal_inside = tl.where(inside, focal_inside + focal, focal_inside)
        focal_outside = tl.where(inside, focal_outside, focal_outside + focal)
        p_inside = tl.where(inside, p_inside + p_true, p_inside)
        p_outside = tl.where(inside, p_outside, p_outside + q)
        wrong_pixels += tl.where(wrong, one, 0)
        missed_pixels += tl.where(wrong & inside, one, 0)
        target_pixels += tl.where(inside, one, 0)
    return focal_inside, focal_outside, p_inside, p_outside, wrong_pixels, missed_pixels, target_pixels


@triton.jit
def differentiate_row(
    logit, to_left, to_right, truth, columns, stride, on_image, gamma,
    focal_inside, focal_outside, p_inside, p_outside,
    GAMMA: tl.constexpr, FACTOR: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Slopes of the pixels of each lane: their sum, and the parts of it owed to the samples to the left and right.

    The last four arguments are the slopes of the sums for a pixel of each class, with the sign of the pixel's logit.
    """
    BITS: tl.constexpr = 1 if PACKED else 8
    word = load_word(truth, columns, stride, on_image, FACTOR, PACKED) if WORDS else columns
    total = tl.zeros(logit.shape, tl.float32)
    leftward = tl.zeros(logit.shape, tl.float32)
    rightward = tl.zeros(logit.shape, tl.float32)
    for r in tl.range(0, FACTOR, loop_unroll_factor=UNROLL):
        if WORDS:
            inside = ((word >> (r * BITS)) & ((1 << BITS) - 1)) != 0
        else:
            inside = load_pixel(truth, columns, r, stride, on_image, FACTOR, PACKED)
        offset = tl.cast(2 * r + 1 - FACTOR, tl.float32) * (0.5 / FACTOR)
        x = logit + tl.abs(offset) * tl.where(offset < 0, to_left, to_right)
        _, q, p_true, loss, power = classify(x, inside, gamma, GAMMA)
        focal, p = tl.where(inside, focal_inside, focal_outside), tl.where(inside, p_inside, p_outside)
        slope = logit_slope(q, p_true, loss, power, focal, p, gamma, GAMMA)
        total += slope
        leftward = tl.where(offset < 0, leftward - offset * slope, leftward)
        rightward = tl.where(offset < 0, rightward, rightward + offset * slope)
    return total, leftward, rightward


@triton.jit
def differentiate_cell(
    top, top_left, top_right, low, low_left, low_right, total, leftward, rightward, has_top, has_low,
    truth, columns, stride_y, stride_x, gamma, focal_inside, focal_outside, p_inside, p_outside,
    GAMMA: tl.constexpr, FACTOR: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr,
    UNROLL_ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """What `differentiate_row` returns, for the samples above a cell, added to `total` and so on, and for those below.

    `has_top`, `has_low`: see `bilinear.cell_row`.
    """
    low_total = tl.zeros(total.shape, tl.float32)
    low_leftward = tl.zeros(total.shape, tl.float32)
    low_rightward = tl.zeros(total.shape, tl.float32)
    for k in tl.range(0, FACTOR, loop_unroll_factor=UNROLL_ROWS):
        weight, on_image, up, down = cell_row(k, has_top, has_low, FACTOR)
        logit, to_left, to_right = blend(top, top_left, top_right, low, low_left, low_right, weight, FACTOR)
        row_total, row_leftward, row_rightward = differentiate_row(
            logit, to_left, to_right, truth, columns, stride_x, on_image, gamma,
            focal_inside, focal_outside, p_inside, p_outside, GAMMA, FACTOR, PACKED, WORDS, UNROLL,
        )  # fmt: skip
        total += up * row_total
        leftward += up * row_leftward
        rightward += up * row_rightward
        if FACTOR > 1:  # else `down` is 0, and 0 times NaN would reach the row below
            low_total += down * row_total
            low_leftward += down * row_leftward
            low_rightward += down * row_rightward
        truth += stride_y
    return total, leftward, rightward, low_total, low_leftward, low_rightward
