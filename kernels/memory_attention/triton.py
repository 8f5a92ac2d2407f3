"""Triton kernels of memory attention. Formulas, numerics and cost: README.md; the ground truth is reference.py.

Scores exist only as tiles in registers. The forward kernel and the one of the queries' gradient own a block of queries
and go through the keys; the one of the keys' and values' gradients owns a block of keys and goes through the queries,
so every sum has one owner and a fixed order. Programs of a batch element follow each other, so that they find its rows
in the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from .tiles import LOG2_E, after_loop, dot, keep, load_rotated, load_rows, row_keys, store_rotated_back, store_rows

_VARYING = ("queries", "keys", "rotated", "positions", "blocks")
"""Arguments for whose values nothing is compiled anew."""


class Blocks(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


# By (compute capability, values wider than 64), for 16-bit tensors: what compiles without spills at D = 256, with the
# fewest instructions for a score. The block that a program keeps is large, since it shares the rotation of the other.
FORWARD = {
    (80, False): Blocks(128, 32, 8, 2),
    (80, True): Blocks(64, 64, 8, 1),
    (90, False): Blocks(128, 64, 8, 2),
    (90, True): Blocks(128, 32, 8, 2),
}
QUERY_GRADIENT = {
    (80, False): Blocks(128, 16, 8, 2),
    (80, True): Blocks(128, 16, 8, 1),
    (90, False): Blocks(128, 32, 8, 2),
    (90, True): Blocks(128, 16, 8, 2),
}
KEY_GRADIENT = {
    (80, False): Blocks(16, 128, 8, 2),
    (80, True): Blocks(64, 32, 8, 1),
    (90, False): Blocks(32, 128, 8, 2),
    (90, True): Blocks(64, 32, 8, 1),
}
FLOAT32 = Blocks(32, 32, 8, 1)
"""Of all kernels; products of float32 use no tensor core."""
ROWS = 64
"""Of a program of `row_kernel`."""


@triton.jit
def _place(blocks, zero, ROWS: tl.constexpr):
    """Batch element (int64) and first row of a program."""
    program = tl.program_id(0) + zero
    return (program // blocks).to(tl.int64), program % blocks * ROWS


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q, q_n, q_l, k, k_n, k_m, v, v_n, v_m, cos, sin, seed, out, row_sum, lse,
    queries, keys, rotated, positions, blocks, scale, kept_scale,
    D: tl.constexpr, DV: tl.constexpr, ROTATE: tl.constexpr, THRESHOLD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`QUERIES` rows of out [N, L, DV], row_sum and lse [N, L], by the softmax with a running maximum."""
    n, first = _place(blocks, 0, QUERIES)
    place = n * queries + first + tl.arange(0, QUERIES)
    q_even, q_odd = load_rotated(
        q + n * q_n, first, q_l, queries, cos, sin, positions, queries, QUERIES, D, ROTATE
    )  # fmt: skip
    k += n * k_n
    v += n * v_n
    if THRESHOLD:
        random = row_keys(seed, place)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    kept = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DV], tl.float32)
    for start in range(0, keys, KEYS):
        columns = start + tl.arange(0, KEYS)
        k_even, k_odd = load_rotated(k, start, k_m, keys, cos, sin, positions, rotated, KEYS, D, ROTATE)
        scores = dot(q_even, tl.trans(k_even), tl.zeros([QUERIES, KEYS], tl.float32))
        scores = dot(q_odd, tl.trans(k_odd), scores)
        scores = scores * (scale * LOG2_E) + tl.where(columns < keys, 0.0, -float("inf"))[None, :]
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(p, 1)
        if THRESHOLD:
            p = tl.where(keep(random[:, None], columns[None, :], THRESHOLD), p, 0.0)
            kept = kept * shrink + tl.sum(p, 1)
        values = load_rows(v, start, v_m, keys, KEYS, DV)
        result = dot(p.to(values.dtype), values, result * shrink[:, None])
        largest = larger
    if not THRESHOLD:
        kept = total

    valid = first + tl.arange(0, QUERIES) < queries
    factor = kept_scale / total
    tl.store(lse + place, largest / LOG2_E + tl.log(total), mask=valid)
    tl.store(row_sum + place, kept * factor, mask=valid)
    store_rows(out + n * queries * DV, first, queries, result * factor[:, None], QUERIES, DV)


@triton.jit(do_not_specialize=("rows",))
def row_kernel(
    grad_out, grad_row_sum, out, row_sum, seed, delta, random_keys, rows,
    DV: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the gradient kernels need of `ROWS` rows of all batch elements: delta and random keys."""
    first = tl.program_id(0) * ROWS
    place = first.to(tl.int64) + tl.arange(0, ROWS)
    valid = place < rows
    slopes = load_rows(grad_out, first, DV, rows, ROWS, DV).to(tl.float32)
    mean = tl.sum(slopes * load_rows(out, first, DV, rows, ROWS, DV).to(tl.float32), 1)
    sum_slope = tl.load(grad_row_sum + place, mask=valid, other=0.0)
    mean += sum_slope * tl.load(row_sum + place, mask=valid, other=0.0)
    tl.store(delta + place, mean, mask=valid)
    if THRESHOLD:
        tl.store(random_keys + place, row_keys(seed, place).to(tl.int32, bitcast=True), mask=valid)


@triton.jit(do_not_specialize=_VARYING)
def query_gradient_kernel(
    q, q_n, q_l, k, k_n, k_m, v, v_n, v_m, cos, sin, lse, grad_out, grad_row_sum, delta, random_keys,
    grad_q, queries, keys, rotated, positions, blocks, scale, kept_scale,
    D: tl.constexpr, DV: tl.constexpr, ROTATE: tl.constexpr, THRESHOLD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`QUERIES` rows of the gradient of q."""
    n, first = _place(blocks, 0, QUERIES)
    rows = first + tl.arange(0, QUERIES)
    place = n * queries + rows
    valid = rows < queries
    slopes = load_rows(grad_out + n * queries * DV, first, DV, queries, QUERIES, DV)
    sum_slope = tl.load(grad_row_sum + place, mask=valid, other=0.0)
    mean = tl.load(delta + place, mask=valid, other=0.0)
    log_total = tl.load(lse + place, mask=valid, other=0.0) * LOG2_E
    if THRESHOLD:
        random = tl.load(random_keys + place, mask=valid, other=0).to(tl.uint32, bitcast=True)
    q_even, q_odd = load_rotated(
        q + n * q_n, first, q_l, queries, cos, sin, positions, queries, QUERIES, D, ROTATE
    )  # fmt: skip
    k += n * k_n
    v += n * v_n
    even = tl.zeros([QUERIES, D // 2], tl.float32)
    odd = tl.zeros([QUERIES, D // 2], tl.float32)
    remaining = keys
    for start in range(0, keys, KEYS):
        remaining -= KEYS
        columns = start + tl.arange(0, KEYS)
        k_even, k_odd = load_rotated(k, start, k_m, keys, cos, sin, positions, rotated, KEYS, D, ROTATE)
        scores = dot(q_even, tl.trans(k_even), tl.zeros([QUERIES, KEYS], tl.float32))
        scores = dot(q_odd, tl.trans(k_odd), scores)
        scores = scores * (scale * LOG2_E) + tl.where(columns < keys, 0.0, -float("inf"))[None, :]
        p = tl.exp2(scores - log_total[:, None])
        values = load_rows(v, start, v_m, keys, KEYS, DV)
        p_slope = dot(slopes, tl.trans(values), tl.zeros([QUERIES, KEYS], tl.float32)) + sum_slope[:, None]
        if THRESHOLD:
            p_slope = tl.where(keep(random[:, None], columns[None, :], THRESHOLD), p_slope, 0.0)
        score_slope = (p * (p_slope * kept_scale - mean[:, None])).to(k_even.dtype)
        even = dot(score_slope, k_even, even)
        odd = dot(score_slope, k_odd, odd)
    n, first = _place(blocks, after_loop(remaining), QUERIES)
    store_rotated_back(
        even * scale, odd * scale, grad_q + n * queries * D, first, queries, cos, sin, positions, queries,
        QUERIES, D, ROTATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def key_gradient_kernel(
    q, q_n, q_l, k, k_n, k_m, v, v_n, v_m, cos, sin, lse, grad_out, grad_row_sum, delta, random_keys,
    grad_k, grad_v, queries, keys, rotated, positions, blocks, scale, kept_scale,
    D: tl.constexpr, DV: tl.constexpr, ROTATE: tl.constexpr, THRESHOLD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`KEYS` rows of the gradients of k and v. Tiles of scores are transposed: [KEYS, QUERIES]."""
    n, first = _place(blocks, 0, KEYS)
    columns = first + tl.arange(0, KEYS)
    k_even, k_odd = load_rotated(
        k + n * k_n, first, k_m, keys, cos, sin, positions, rotated, KEYS, D, ROTATE
    )  # fmt: skip
    values = load_rows(v + n * v_n, first, v_m, keys, KEYS, DV)
    q += n * q_n
    grad_out += n * queries * DV
    even = tl.zeros([KEYS, D // 2], tl.float32)
    odd = tl.zeros([KEYS, D // 2], tl.float32)
    v_slope = tl.zeros([KEYS, DV], tl.float32)
    remaining = queries
    for start in range(0, queries, QUERIES):
        remaining -= QUERIES
        rows = start + tl.arange(0, QUERIES)
        place = n * queries + rows
        valid = rows < queries
        # Rows beyond the last have probability 0.
        log_total = tl.load(lse + place, mask=valid, other=float("inf")) * LOG2_E
        q_even, q_odd = load_rotated(q, start, q_l, queries, cos, sin, positions, queries, QUERIES, D, ROTATE)
        scores = dot(k_even, tl.trans(q_even), tl.zeros([KEYS, QUERIES], tl.float32))
        scores = dot(k_odd, tl.trans(q_odd), scores)
        p = tl.exp2(scores * (scale * LOG2_E) - log_total[None, :])
        kept = p
        if THRESHOLD:
            random = tl.load(random_keys + place, mask=valid, other=0).to(tl.uint32, bitcast=True)
            kept_bits = keep(random[None, :], columns[:, None], THRESHOLD)
            kept = tl.where(kept_bits, p, 0.0)
        slopes = load_rows(grad_out, start, DV, queries, QUERIES, DV)
        v_slope = dot(kept.to(slopes.dtype), slopes, v_slope)
        sum_slope = tl.load(grad_row_sum + place, mask=valid, other=0.0)
        p_slope = dot(values, tl.trans(slopes), tl.zeros([KEYS, QUERIES], tl.float32)) + sum_slope[None, :]
        if THRESHOLD:
            p_slope = tl.where(kept_bits, p_slope, 0.0)
        mean = tl.load(delta + place, mask=valid, other=0.0)
        score_slope = (p * (p_slope * kept_scale - mean[None, :])).to(q_even.dtype)
        even = dot(score_slope, q_even, even)
        odd = dot(score_slope, q_odd, odd)
    n, first = _place(blocks, after_loop(remaining), KEYS)
    store_rows(grad_v + n * keys * DV, first, keys, v_slope * kept_scale, KEYS, DV)
    store_rotated_back(
        even * scale, odd * scale, grad_k + n * keys * D, first, keys, cos, sin, positions, rotated,
        KEYS, D, ROTATE,
    )  # fmt: skip


def memory_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.memory_attention`."""
    launch = forward_launch(q, k, v, cos, sin, num_unrotated, dropout, seed)
    launch.run()
    out, row_sum, lse = (launch.arguments[name] for name in ("out", "row_sum", "lse"))
    return _narrow(out, v.shape[2]), row_sum, lse


def memory_attention_backward(
    grad_out: Tensor, grad_row_sum: Tensor, out: Tensor, row_sum: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `reference.memory_attention_backward`."""
    launches = gradient_launches(
        grad_out, grad_row_sum, out, row_sum, lse, q, k, v, cos, sin, num_unrotated, dropout, seed
    )
    for launch in launches:
        launch.run()
    _, of_queries, of_keys = (launch.arguments for launch in launches)
    return (
        _narrow(of_queries["grad_q"], q.shape[2]),
        _narrow(of_keys["grad_k"], k.shape[2]),
        _narrow(of_keys["grad_v"], v.shape[2]),
    )


def forward_launch(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor,
    capability: int | None = None,
) -> Launch:  # fmt: skip
    """Leaves `out` [N, L, DV], `row_sum` and `lse` [N, L]; for the GPU of the tensors if `capability` is None."""
    arguments = _inputs(q, k, v, cos, sin, num_unrotated, dropout)
    n, queries, _ = q.shape
    block = _blocks(FORWARD, arguments, capability)
    arguments |= {
        "seed": seed,
        "out": v.new_empty((n, queries, arguments["DV"])),
        "row_sum": q.new_empty((n, queries), dtype=torch.float32),
        "lse": q.new_empty((n, queries), dtype=torch.float32),
    }
    return _launch(forward_kernel, n, triton.cdiv(queries, block.queries), arguments, block)


def gradient_launches(
    grad_out: Tensor, grad_row_sum: Tensor, out: Tensor, row_sum: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor,
    capability: int | None = None,
) -> tuple[Launch, Launch, Launch]:  # fmt: skip
    """To run one after the other; the second leaves `grad_q`, the third `grad_k` and `grad_v`."""
    arguments = _inputs(q, k, v, cos, sin, num_unrotated, dropout)
    n, queries, _ = q.shape
    keys, width, value_width = k.shape[1], arguments["D"], arguments["DV"]
    of_rows = {
        "grad_out": _widened(grad_out, value_width).contiguous(),
        "grad_row_sum": grad_row_sum.contiguous(),
        "delta": torch.empty_like(lse),
        "random_keys": lse.new_empty(lse.shape if dropout else 0, dtype=torch.int32),
    }
    rows = of_rows | {
        "out": _widened(out, value_width),
        "row_sum": row_sum,
        "seed": seed,
        "rows": n * queries,
        "DV": value_width,
        "THRESHOLD": arguments["THRESHOLD"],
        "ROWS": ROWS,
    }
    arguments |= of_rows | {"lse": lse}
    of_queries = arguments | {"grad_q": q.new_empty((n, queries, width))}
    of_keys = arguments | {
        "grad_k": k.new_empty((n, keys, width)),
        "grad_v": v.new_empty((n, keys, value_width)),
    }
    query_block = _blocks(QUERY_GRADIENT, arguments, capability)
    key_block = _blocks(KEY_GRADIENT, arguments, capability)
    return (
        Launch(row_kernel, triton.cdiv(n * queries, ROWS), rows),
        _launch(query_gradient_kernel, n, triton.cdiv(queries, query_block.queries), of_queries, query_block),
        _launch(key_gradient_kernel, n, triton.cdiv(keys, key_block.keys), of_keys, key_block),
    )


def _inputs(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float) -> dict:
    """Arguments of all kernels that work on scores."""
    arguments = {
        "cos": cos,
        "sin": sin,
        "queries": q.shape[1],
        "keys": k.shape[1],
        "rotated": k.shape[1] - num_unrotated,
        "positions": len(cos),
        "scale": q.shape[2] ** -0.5,
        "kept_scale": 1 / (1 - dropout),
        "D": max(32, triton.next_power_of_2(q.shape[2])),
        "DV": max(16, triton.next_power_of_2(v.shape[2])),
        "ROTATE": len(cos) > 0,
        "THRESHOLD": int(dropout * 2**32),
    }
    for name in ("cos", "sin"):
        arguments[name] = _widened(arguments[name], arguments["D"] // 2).contiguous()
    for name, tensor, width, row in (("q", q, "D", "l"), ("k", k, "D", "m"), ("v", v, "DV", "m")):
        tensor = _widened(tensor, arguments[width])
        tensor = tensor if tensor.stride(2) == 1 else tensor.contiguous()
        arguments |= {name: tensor, f"{name}_n": tensor.stride(0), f"{name}_{row}": tensor.stride(1)}
    return arguments


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the channels, which change neither scores nor the other channels; tiles are powers of two wide."""
    return tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))


def _narrow(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()


def _blocks(table: dict[tuple[int, bool], Blocks], arguments: dict, capability: int | None) -> Blocks:
    tensor = arguments["q"]
    if max(arguments["D"], arguments["DV"]) > 256:
        raise ValueError(
            f"the Triton kernels take queries, keys and values up to 256 wide, not {arguments['D']} and "
            f"{arguments['DV']}: use backend='reference'"
        )
    if tensor.dtype == torch.float32:
        return FLOAT32
    if capability is None:
        major = torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 8
        capability = 90 if major >= 9 else 80
    return table[capability, arguments["DV"] > 64]


def _launch(kernel, n: int, count: int, arguments: dict, block: Blocks) -> Launch:
    arguments = arguments | {"blocks": count, "QUERIES": block.queries, "KEYS": block.keys}
    return Launch(kernel, n * count, {name: arguments[name] for name in kernel.arg_names}, block.warps, block.stages)
