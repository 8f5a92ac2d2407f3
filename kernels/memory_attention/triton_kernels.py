"""Triton kernels of memory attention. Formulas, numerics and cost: README.md; the ground truth is reference.py.

Queries and keys are rotated once, into scratch tensors, so that the loops of the other kernels are products, softmax
and dropout alone. Scores exist only as tiles in registers. The forward kernel and that of the queries' gradient own a
block of queries and a part of the keys, whose results are then added up; the one of the keys' and values' gradients
owns a block of keys and goes through the queries. So every sum has a fixed order. Programs of a batch element follow
each other, so that they find its rows in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LOG2_E,
    add_halves,
    inner_products,
    keep,
    load_halves,
    load_numbers,
    load_rows,
    row_keys,
    store_halves,
    store_rows,
    zero_halves,
)

_VARYING = ("queries", "keys", "chunk", "rows", "rotated", "positions", "blocks", "parts")
"""Arguments for whose values nothing is compiled anew."""


@triton.jit(do_not_specialize=_VARYING)
def rotate_kernel(
    x, x_n, x_l, cos, sin, out, rows, parts, rotated, positions, blocks, sign, scale,
    D: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of out [N, L, D], dense: the rotated scaled sum of the parts of x [parts, N, L, D], in float32.

    `sign` -1 rotates back, which is what a gradient needs. Rows from `rotated` on do not rotate.
    """
    program = tl.program_id(0)
    n, first = (program // blocks).to(tl.int64), program % blocks * ROWS
    count = (tl.num_programs(0) // blocks).to(tl.int64)
    total = load_rows(x + n * x_n, first, x_l, rows, ROWS, D).to(tl.float32)
    for part in range(1, parts):
        total += load_rows(x + (part * count + n) * x_n, first, x_l, rows, ROWS, D).to(tl.float32)
    total *= scale
    if ROTATE:
        row = first + tl.arange(0, ROWS)
        places = (row % positions)[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        mask = row[:, None] < rotated
        c = tl.load(cos + places, mask=mask, other=1.0)
        s = tl.load(sin + places, mask=mask, other=0.0) * sign
        even, odd = tl.split(tl.reshape(total, [ROWS, D // 2, 2]))
        total = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [ROWS, D])
    store_rows(out + n * rows * D, first, rows, total, ROWS, D)


@triton.jit
def _place(blocks, parts, chunk, keys, ROWS: tl.constexpr):
    """Batch element (int64), index of part and batch element (int64), first row, first and last key of a program."""
    program = tl.program_id(0)
    group = program // blocks
    n, part = group // parts, group % parts
    count = tl.num_programs(0) // (blocks * parts)
    start = part * chunk
    return n.to(tl.int64), (part * count + n).to(tl.int64), program % blocks * ROWS, start, min(start + chunk, keys)


@triton.jit
def _scores(
    q_left, q_right, k, start, keys, D: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr, FULL: tl.constexpr
):
    """Numbers of `KEYS` keys, their halves, and the unscaled scores of a block of queries; none beyond the last key."""
    columns = start + tl.arange(0, KEYS)
    k_left, k_right = load_halves(k, start, D, keys, KEYS, D, HALVES, FULL)
    scores = inner_products(q_left, q_right, k_left, k_right, HALVES)
    if not FULL:
        scores = tl.where(columns[None, :] < keys, scores, -float("inf"))
    return columns, k_left, k_right, scores


@triton.jit
def _attend(
    q_left, q_right, k, v, v_m, start, keys, random, largest, total, kept, left, right, scale,
    D: tl.constexpr, DV: tl.constexpr, THRESHOLD: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr,
    VALUE_HALVES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One step of the softmax with a running maximum, over `KEYS` keys. Maxima are those of scores to the base 2."""
    columns, _, _, scores = _scores(q_left, q_right, k, start, keys, D, KEYS, HALVES, FULL)
    larger = tl.maximum(largest, tl.max(scores, 1) * (scale * LOG2_E))
    shrink = tl.exp2(largest - larger)
    p = tl.exp2(scores * (scale * LOG2_E) - larger[:, None])
    total = total * shrink + tl.sum(p, 1)
    if THRESHOLD:
        p = tl.where(keep(random[:, None], columns[None, :], THRESHOLD), p, 0.0)
        kept = kept * shrink + tl.sum(p, 1)
    v_left, v_right = load_halves(v, start, v_m, keys, KEYS, DV, VALUE_HALVES, FULL)
    left *= shrink[:, None]
    if VALUE_HALVES:
        right *= shrink[:, None]
    left, right = add_halves(p.to(v_left.dtype), v_left, v_right, left, right, VALUE_HALVES)
    return larger, total, kept, left, right


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q, k, v, v_n, v_m, seed, result, state, queries, keys, chunk, blocks, parts, scale,
    D: tl.constexpr, DV: tl.constexpr, THRESHOLD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HALVES: tl.constexpr, VALUE_HALVES: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the keys for `QUERIES` rows: result [parts, N, L, DV], and in state [parts, N, L, 3] the
    maximum of the scores to the base 2, the sum of the exponentials above it, and that of the kept ones."""
    n, place, first, start, end = _place(blocks, parts, chunk, keys, QUERIES)
    rows = first + tl.arange(0, QUERIES)
    q_left, q_right = load_halves(q + n * queries * D, first, D, queries, QUERIES, D, HALVES)
    k += n * keys * D
    v += n * v_n
    random = row_keys(seed, n * queries + rows) if THRESHOLD else rows
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    kept = tl.zeros([QUERIES], tl.float32)
    left, right = zero_halves(QUERIES, DV, VALUE_HALVES)
    whole = start + (end - start) // KEYS * KEYS
    for at in range(start, whole, KEYS):
        largest, total, kept, left, right = _attend(
            q_left, q_right, k, v, v_m, at, keys, random, largest, total, kept, left, right, scale,
            D, DV, THRESHOLD, KEYS, HALVES, VALUE_HALVES, True,
        )  # fmt: skip
    if whole < end:
        largest, total, kept, left, right = _attend(
            q_left, q_right, k, v, v_m, whole, keys, random, largest, total, kept, left, right, scale,
            D, DV, THRESHOLD, KEYS, HALVES, VALUE_HALVES, False,
        )  # fmt: skip
    store_halves(result + place * queries * DV, first, queries, left, right, QUERIES, DV, VALUE_HALVES)
    state += (place * queries + rows) * 3
    valid = rows < queries
    tl.store(state, largest, mask=valid)
    tl.store(state + 1, total, mask=valid)
    tl.store(state + 2, kept if THRESHOLD else total, mask=valid)


@triton.jit(do_not_specialize=_VARYING)
def combine_kernel(
    result, state, out, row_sum, lse, rows, parts, kept_scale, DV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """`ROWS` rows of out [N, L, DV], row_sum and lse [N, L] from what the parts of the keys left."""
    first = tl.program_id(0) * ROWS
    place = first.to(tl.int64) + tl.arange(0, ROWS)
    valid = place < rows
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DV], tl.float32)
    for part in range(parts):
        of_part = state + (part * rows.to(tl.int64) + place) * 3
        peak = tl.load(of_part, mask=valid, other=0.0)
        larger = tl.maximum(largest, peak)
        shrink, weight = tl.exp2(largest - larger), tl.exp2(peak - larger)
        total = total * shrink + weight * tl.load(of_part + 1, mask=valid, other=1.0)
        kept = kept * shrink + weight * tl.load(of_part + 2, mask=valid, other=1.0)
        more = load_rows(result + part * rows.to(tl.int64) * DV, first, DV, rows, ROWS, DV)
        sums = sums * shrink[:, None] + weight[:, None] * more
        largest = larger
    factor = kept_scale / total
    tl.store(lse + place, largest / LOG2_E + tl.log(total), mask=valid)
    tl.store(row_sum + place, kept * factor, mask=valid)
    store_rows(out, first, rows, sums * factor[:, None], ROWS, DV)


@triton.jit(do_not_specialize=("rows",))
def row_kernel(
    grad_out, grad_row_sum, out, row_sum, seed, delta, offset, random_keys, rows, kept_scale,
    DV: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the gradient kernels need of `ROWS` rows of all batch elements: delta, g / (1 - p) - delta, random keys."""
    first = tl.program_id(0) * ROWS
    place = first.to(tl.int64) + tl.arange(0, ROWS)
    valid = place < rows
    slopes = load_rows(grad_out, first, DV, rows, ROWS, DV).to(tl.float32)
    mean = tl.sum(slopes * load_rows(out, first, DV, rows, ROWS, DV).to(tl.float32), 1)
    sum_slope = tl.load(grad_row_sum + place, mask=valid, other=0.0)
    mean += sum_slope * tl.load(row_sum + place, mask=valid, other=0.0)
    tl.store(delta + place, mean, mask=valid)
    tl.store(offset + place, sum_slope * kept_scale - mean, mask=valid)
    if THRESHOLD:
        tl.store(random_keys + place, row_keys(seed, place).to(tl.int32, bitcast=True), mask=valid)


@triton.jit
def _descend(
    q_left, q_right, k, v, v_m, start, keys, slope_left, slope_right, shift, mean, log_total, random, left, right,
    scale, kept_scale,
    D: tl.constexpr, DV: tl.constexpr, THRESHOLD: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr,
    VALUE_HALVES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Adds what `KEYS` keys contribute to the gradient of a block of queries."""
    columns, k_left, k_right, scores = _scores(q_left, q_right, k, start, keys, D, KEYS, HALVES, FULL)
    p = tl.exp2(scores * (scale * LOG2_E) - log_total[:, None])
    v_left, v_right = load_halves(v, start, v_m, keys, KEYS, DV, VALUE_HALVES, FULL)
    p_slope = inner_products(slope_left, slope_right, v_left, v_right, VALUE_HALVES) * kept_scale + shift[:, None]
    if THRESHOLD:
        p_slope = tl.where(keep(random[:, None], columns[None, :], THRESHOLD), p_slope, -mean[:, None])
    return add_halves((p * p_slope).to(k_left.dtype), k_left, k_right, left, right, HALVES)


@triton.jit(do_not_specialize=_VARYING)
def query_gradient_kernel(
    q, k, v, v_n, v_m, lse, grad_out, delta, offset, random_keys, grad_q,
    queries, keys, chunk, blocks, parts, scale, kept_scale,
    D: tl.constexpr, DV: tl.constexpr, THRESHOLD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HALVES: tl.constexpr, VALUE_HALVES: tl.constexpr,
):  # fmt: skip
    """What a part of the keys contributes to `QUERIES` rows of the gradient of rotated q, unscaled: [parts, N, L, D]"""
    n, place, first, start, end = _place(blocks, parts, chunk, keys, QUERIES)
    rows = first + tl.arange(0, QUERIES)
    numbers = n * queries + rows
    valid = rows < queries
    slope_left, slope_right = load_halves(
        grad_out + n * queries * DV, first, DV, queries, QUERIES, DV, VALUE_HALVES
    )  # fmt: skip
    shift = tl.load(offset + numbers, mask=valid, other=0.0)
    mean = tl.load(delta + numbers, mask=valid, other=0.0)
    log_total = tl.load(lse + numbers, mask=valid, other=0.0) * LOG2_E
    random = rows
    if THRESHOLD:
        random = tl.load(random_keys + numbers, mask=valid, other=0).to(tl.uint32, bitcast=True)
    q_left, q_right = load_halves(q + n * queries * D, first, D, queries, QUERIES, D, HALVES)
    k += n * keys * D
    v += n * v_n
    left, right = zero_halves(QUERIES, D, HALVES)
    whole = start + (end - start) // KEYS * KEYS
    for at in range(start, whole, KEYS):
        left, right = _descend(
            q_left, q_right, k, v, v_m, at, keys, slope_left, slope_right, shift, mean, log_total, random, left, right,
            scale, kept_scale, D, DV, THRESHOLD, KEYS, HALVES, VALUE_HALVES, True,
        )  # fmt: skip
    if whole < end:
        left, right = _descend(
            q_left, q_right, k, v, v_m, whole, keys, slope_left, slope_right, shift, mean, log_total, random, left,
            right, scale, kept_scale, D, DV, THRESHOLD, KEYS, HALVES, VALUE_HALVES, False,
        )  # fmt: skip
    store_halves(grad_q + place * queries * D, first, queries, left, right, QUERIES, D, HALVES)


@triton.jit(do_not_specialize=_VARYING)
def key_gradient_kernel(
    q, k, v, v_n, v_m, lse, grad_out, delta, offset, random_keys, grad_k, grad_v,
    queries, keys, blocks, scale, kept_scale,
    D: tl.constexpr, DV: tl.constexpr, THRESHOLD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HALVES: tl.constexpr, VALUE_HALVES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """`KEYS` rows of the gradients of rotated k and of v. Tiles of scores are transposed: [KEYS, QUERIES]."""
    program = tl.program_id(0)
    n, first = (program // blocks).to(tl.int64), program % blocks * KEYS
    columns = first + tl.arange(0, KEYS)
    k_left, k_right = load_halves(k + n * keys * D, first, D, keys, KEYS, D, HALVES)
    v_left, v_right = load_halves(v + n * v_n, first, v_m, keys, KEYS, DV, VALUE_HALVES)
    q += n * queries * D
    grad_out += n * queries * DV
    of_k_left, of_k_right = zero_halves(KEYS, D, HALVES)
    of_v_left, of_v_right = zero_halves(KEYS, DV, VALUE_HALVES)
    for start in range(0, queries, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        numbers = n * queries + rows
        valid = rows < queries
        q_left, q_right = load_halves(q, start, D, queries, QUERIES, D, HALVES, FULL)
        # Rows beyond the last have probability 0.
        log_total = load_numbers(lse, numbers, valid, float("inf"), FULL) * LOG2_E
        scores = inner_products(k_left, k_right, q_left, q_right, HALVES)
        p = tl.exp2(scores * (scale * LOG2_E) - log_total[None, :])
        kept = p
        if THRESHOLD:
            random = load_numbers(random_keys, numbers, valid, 0, FULL).to(tl.uint32, bitcast=True)
            kept_bits = keep(random[None, :], columns[:, None], THRESHOLD)
            kept = tl.where(kept_bits, p, 0.0)
        slope_left, slope_right = load_halves(grad_out, start, DV, queries, QUERIES, DV, VALUE_HALVES, FULL)
        of_v_left, of_v_right = add_halves(
            kept.to(slope_left.dtype), slope_left, slope_right, of_v_left, of_v_right, VALUE_HALVES
        )  # fmt: skip
        shift = load_numbers(offset, numbers, valid, 0.0, FULL)
        p_slope = inner_products(v_left, v_right, slope_left, slope_right, VALUE_HALVES) * kept_scale + shift[None, :]
        if THRESHOLD:
            mean = load_numbers(delta, numbers, valid, 0.0, FULL)
            p_slope = tl.where(kept_bits, p_slope, -mean[None, :])
        of_k_left, of_k_right = add_halves(
            (p * p_slope).to(q_left.dtype), q_left, q_right, of_k_left, of_k_right, HALVES
        )  # fmt: skip
    store_halves(
        grad_v + n * keys * DV, first, keys, of_v_left * kept_scale, of_v_right * kept_scale, KEYS, DV, VALUE_HALVES
    )  # fmt: skip
    store_halves(grad_k + n * keys * D, first, keys, of_k_left * scale, of_k_right * scale, KEYS, D, HALVES)
