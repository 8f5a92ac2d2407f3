"""Attention between a few tokens and an image, with the projections of the image absorbed into the tokens.

Scores are bilinear: with q = Wq t + bq of a token and k = Wk x + bk of a cell, q . k = (Wk^T q) . x + q . bk. So the
image is not projected at all; a token has one vector of its width for each head instead. For L tokens, h heads and C
channels a cell costs 2 h L C multiplications in either direction, against 2 C^2 / 2 of the projections to half the
width and h L C / 8 of attention: less up to about L = 16, and no projected image exists.

Both operators keep their inputs for the backward pass and nothing else: what else it needs is computed again from
them, which takes one matrix product each. Under autocast products run in its dtype and the image, a residual stream,
stays in its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from sam2fast_kernels.layer_norm import layer_norm_backward, normalize

from .layers import compute_dtype, without_autocast

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}
"""Elements of the widest map of the objects that are computed at once: on a CPU these stay in its cache."""


def object_chunks(count: int, elements: int, device: str) -> Iterator[slice]:
    """Slices of `count` objects, each with a widest map of `elements` elements."""
    size = max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // elements)
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


def part(x: Tensor, chunk: slice) -> Tensor:
    """Rows of a chunk; the only row of what is equal for all objects."""
    return x if len(x) == 1 else x[chunk]


def with_part(whole: Tensor | None, chunk: slice, value: Tensor, count: int) -> Tensor:
    """What the parts of `count` objects are so far: `value` itself, without a copy, where it is of all objects."""
    if len(value) == count:
        return value
    whole = value.new_empty(count, *value.shape[1:]) if whole is None else whole
    whole[chunk] = value
    return whole


def empty_total(x: Tensor) -> Tensor | None:
    """What `with_gradient` begins with; sums are in float32 at least."""
    return zero_total(x) if len(x) == 1 else None


def zero_total(x: Tensor) -> Tensor:
    """Zeros to add gradients of x to, in float32 at least."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def with_gradient(total: Tensor | None, chunk: slice, value: Tensor, x: Tensor, count: int) -> Tensor:
    """The gradient of x with that of a chunk of `count` objects: stored, or added up where x has one row for all."""
    if len(x) == 1:
        total += value if len(value) == 1 else value.sum(0, keepdim=True, dtype=total.dtype)
        return total
    return with_part(total, chunk, value, count)


def attend_to_image(queries: Tensor, image: Tensor, position: Tensor) -> Tensor:
    """Softmax of queries (image + position)^T over the cells, times the image.

    Args:
        queries: [N, M, C], all heads of all tokens, scaled.
        image: [N or 1, hw, C]; position: [1, hw, C], without gradient.

    Returns:
        sums of cells [N, M, C] in the dtype of products.
    """
    dtype = compute_dtype(image)
    with without_autocast(queries):
        return _AttendToImage.apply(queries.to(dtype), image, position)


def attend_to_tokens(
    image: Tensor,
    position: Tensor,
    keys: Tensor,
    offsets: Tensor,
    values: Tensor,
    norm: tuple[Tensor, Tensor, float],
    num_heads: int,
) -> Tensor:
    """LayerNorm(image + softmax((image + position) keys^T + offsets) values), the softmax over the tokens of a head.

    Args:
        image: [N or 1, hw, C]; position: [1, hw, C], without gradient.
        keys, values: [N, M, C] for M = heads * tokens, heads outermost, keys scaled; offsets: [N, M].
        norm: weight, bias and epsilon of the layer norm.

    Returns:
        [N, hw, C] in the dtype of the sum.
    """
    dtype = compute_dtype(image)
    with without_autocast(image):
        return _AttendToTokens.apply(
            image, position, keys.to(dtype), offsets.to(dtype), values.to(dtype), *norm, num_heads
        )


def _cells(image: Tensor, position: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of objects with their cells, alone and with position, in the dtype of the tokens `like` [N, M, C]."""
    shared = len(image) == 1
    width = like.shape[1] if shared else max(like.shape[1:])
    cells = placed = None
    for chunk in object_chunks(len(like), image.shape[1] * width, image.device.type):
        if cells is None or not shared:
            cells = part(image, chunk).to(like.dtype)
            placed = cells + position.to(like.dtype)
        yield chunk, cells, placed


class _AttendToImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, queries: Tensor, image: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(queries, image, position)
        out, count = None, len(queries)
        for chunk, cells, placed in _cells(image, position, queries):
            weights = _merge(queries[chunk], image) @ placed.mT
            sums = (weights.softmax(-1) @ cells).view_as(queries[chunk])
            out = with_part(out, chunk, sums, count)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, image, position = ctx.saved_tensors
        grad_queries, grad_image, count = None, empty_total(image), len(queries)
        with without_autocast(image):
            for chunk, cells, placed in _cells(image, position, queries):
                query, grad_out = _merge(queries[chunk], image), _merge(grad[chunk], image)
                weights = (query @ placed.mT).softmax(-1)
                grad_scores = _softmax_backward(grad_out @ cells.mT, weights)
                grad_queries = with_part(grad_queries, chunk, (grad_scores @ placed).view_as(queries[chunk]), count)
                of_cells = (weights.mT @ grad_out).baddbmm_(grad_scores.mT, query)
                grad_image = with_gradient(grad_image, chunk, of_cells, image, count)
        return grad_queries, grad_image.to(image.dtype), None


class _AttendToTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        image: Tensor,
        position: Tensor,
        keys: Tensor,
        offsets: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        num_heads: int,
    ) -> Tensor:
        ctx.save_for_backward(image, position, keys, offsets, values, weight, bias)
        ctx.eps, ctx.num_heads = eps, num_heads
        out = None
        for chunk, _, placed in _cells(image, position, keys):
            _, summed = _sum_tokens(image, placed, keys, offsets, values, chunk, num_heads)
            out = with_part(out, chunk, normalize(summed, weight, bias, eps)[0], len(keys))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, position, keys, offsets, values, weight, bias = ctx.saved_tensors
        grad_image = empty_total(image)
        grad_keys, grad_offsets, grad_values, count = None, None, None, len(keys)
        grad_weight, grad_bias = zero_total(weight), zero_total(bias)
        with without_autocast(image):
            for chunk, _, placed in _cells(image, position, keys):
                weights, summed = _sum_tokens(image, placed, keys, offsets, values, chunk, ctx.num_heads)
                grad_sum, *grads = layer_norm_backward(grad[chunk], summed, weight, bias, ctx.eps)
                grad_weight += grads[0]
                grad_bias += grads[1]
                grad_out = grad_sum.to(keys.dtype)
                grad_values = with_part(grad_values, chunk, weights.mT @ grad_out, count)
                by_head = (*weights.shape[:2], ctx.num_heads, weights.shape[2] // ctx.num_heads)
                grad_scores = _softmax_backward((grad_out @ values[chunk].mT).view(by_head), weights.view(by_head))
                grad_scores = grad_scores.flatten(2)
                grad_keys = with_part(grad_keys, chunk, grad_scores.mT @ placed, count)
                grad_offsets = with_part(grad_offsets, chunk, grad_scores.sum(1), count)
                grad_image = with_gradient(grad_image, chunk, grad_sum.add_(grad_scores @ keys[chunk]), image, count)
        grad_norm = (grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None)
        return grad_image.to(image.dtype), None, grad_keys, grad_offsets, grad_values, *grad_norm, None


def _sum_tokens(
    image: Tensor, placed: Tensor, keys: Tensor, offsets: Tensor, values: Tensor, chunk: slice, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Attention weights [n, hw, M] of a chunk and the image plus the values they sum [n, hw, C]."""
    keys = keys[chunk]
    scores = torch.baddbmm(offsets[chunk].unsqueeze(1), placed.expand(len(keys), -1, -1), keys.mT)
    weights = scores.unflatten(2, (num_heads, scores.shape[2] // num_heads)).softmax(-1).flatten(2)
    return weights, part(image, chunk) + weights @ values[chunk]


def _merge(rows: Tensor, image: Tensor) -> Tensor:
    """All tokens of a chunk [n, M, C] as those of one object [1, n M, C] where they see the same image."""
    return rows.reshape(1, -1, rows.shape[-1]) if len(image) == 1 else rows


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
