"""Memory attention on the CPU: matrix products over blocks of queries, with compiled loops between them.

A block's scores fit into the cache, and both passes overwrite them; no other score is stored. Products are those of
torch in float32, also for half precisions: rounding the scores to bfloat16 would cost more accuracy than dropout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import library

BLOCK_BYTES = 16 << 20
"""Scores of a block of queries, so that a block and the keys stay in the last-level cache."""
BLOCK_QUERIES = (64, 512)
"""Fewest and most queries of a block: the products are slow with fewer, and gain nothing with more."""
ALIGNMENT = 16
"""Scores; rows start at multiples of 64 bytes, as products with rows of 7196 packed scores take up to 1.4 times as
long."""

COMPILED_STEP = "attention_weights.cpp"

# Rows [L, D], float32: rotated and scaled; the last `num_unrotated` are scaled only.
library.define_native(
    "rotate_rows.cpp",
    "(Tensor x, Tensor cos, Tensor sin, int num_unrotated, float scale, bool inverse, ScalarType dtype) -> Tensor",
)
# Scores [B, M] of rows `first` on become dropped weights; fills lse [B] and row_sum [B].
library.define_native(
    COMPILED_STEP,
    "(Tensor(a!) scores, Tensor seed, int first, float dropout, Tensor(b!) lse, Tensor(c!) row_sum) -> ()",
)
# Scores become dropped weights again, and `slopes`, gradients of the dropped weights, those of the scores.
library.define_native(
    "attention_slopes.cpp",
    "(Tensor(a!) scores, Tensor(b!) slopes, Tensor seed, int first, float dropout, Tensor lse, Tensor delta, "
    "Tensor grad_row_sum) -> ()",
)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, scale: float) -> list[Tensor]:
    """Float32 rows of every object; those of an expanded tensor once."""
    ops = torch.ops.sam2fast
    if x.stride(0) == 0 and len(x):
        return [ops.rotate_rows.cpp(x[0], cos, sin, num_unrotated, scale, False, torch.float32)] * len(x)
    return [ops.rotate_rows.cpp(row, cos, sin, num_unrotated, scale, False, torch.float32) for row in x]


def _blocks(queries: int, keys: int) -> Iterator[slice]:
    low, high = BLOCK_QUERIES
    size = max(low, min(high, BLOCK_BYTES // (4 * keys)))
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def _score_buffer(blocks: list[slice], keys: int) -> Tensor:
    """Room for the scores of a block [B, M]."""
    rows = blocks[0].stop if blocks else 0
    return torch.empty(rows, keys + -keys % ALIGNMENT)[:, :keys]


def memory_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.memory_attention`; also the logarithm of each row's sum of exponentials [N, L]."""
    (n, queries, width), keys = q.shape, k.shape[1]
    turned_q = _rotated(q, cos, sin, 0, width**-0.5)
    turned_k = _rotated(k, cos, sin, num_unrotated, 1.0)
    out = torch.empty(n, queries, v.shape[2])
    row_sum, lse = torch.empty(n, queries), torch.empty(n, queries)
    blocks = list(_blocks(queries, keys))
    buffer = _score_buffer(blocks, keys)
    for index in range(n):
        values, key_columns = v[index].float(), turned_k[index].t()
        for block in blocks:
            scores = buffer[: block.stop - block.start]
            torch.mm(turned_q[index][block], key_columns, out=scores)
            torch.ops.sam2fast.attention_weights.cpp(
                scores, seed, index * queries + block.start, dropout, lse[index, block], row_sum[index, block]
            )
            torch.mm(scores, values, out=out[index, block])
    return out.to(v.dtype), row_sum, lse


def memory_attention_backward(
    grad_out: Tensor,
    grad_row_sum: Tensor,
    out: Tensor,
    row_sum: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_unrotated: int,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes."""
    (n, queries, width), keys = q.shape, k.shape[1]
    scale = width**-0.5
    turned_q = _rotated(q, cos, sin, 0, scale)
    turned_k = _rotated(k, cos, sin, num_unrotated, 1.0)
    grad_out, grad_row_sum = grad_out.float(), grad_row_sum.contiguous()
    delta = torch.addcmul((grad_out * out).sum(-1), grad_row_sum, row_sum)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    blocks = list(_blocks(queries, keys))
    score_buffer, slope_buffer = _score_buffer(blocks, keys), _score_buffer(blocks, keys)
    turned_grad_q = torch.empty(queries, width)
    ops = torch.ops.sam2fast
    for index in range(n):
        value_columns = v[index].float().t()
        key_sum, value_sum = torch.zeros(keys, width), torch.zeros(keys, v.shape[2])
        for block in blocks:
            scores, slopes = (buffer[: block.stop - block.start] for buffer in (score_buffer, slope_buffer))
            upstream, queries_here = grad_out[index, block], turned_q[index][block]
            torch.mm(queries_here, turned_k[index].t(), out=scores)
            torch.mm(upstream, value_columns, out=slopes)
            ops.attention_slopes.cpp(
                scores,
                slopes,
                seed,
                index * queries + block.start,
                dropout,
                lse[index, block],
                delta[index, block],
                grad_row_sum[index, block],
            )
            torch.addmm(value_sum, scores.t(), upstream, out=value_sum)
            torch.mm(slopes, turned_k[index], out=turned_grad_q[block])
            torch.addmm(key_sum, slopes.t(), queries_here, out=key_sum)
        # The scale is part of the queries, so that of their gradient alone is missing.
        grad_q[index] = ops.rotate_rows.cpp(turned_grad_q, cos, sin, 0, scale, True, q.dtype)
        grad_k[index] = ops.rotate_rows.cpp(key_sum, cos, sin, num_unrotated, 1.0, True, k.dtype)
        grad_v[index] = value_sum
    return grad_q, grad_k, grad_v
