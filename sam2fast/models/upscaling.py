"""Mask features at stride 16 to mask logits at stride 4, without the maps in between.

A transposed convolution with kernel 2 and stride 2 is one matrix product that makes four cells of each cell. Nothing in
the decoder's upscaling looks at a neighbor, so the four cells stay beside each other in memory (blocked order): two
steps turn a row of `dim` channels into 16 rows of dim / 8, and only the few mask logits are put in image order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from sam2fast_kernels.layer_norm import layer_norm_backward, normalize

from .image_attention import empty_total, object_chunks, part, with_gradient, with_part, zero_total
from .layers import compute_dtype, without_autocast


def block(x: Tensor, levels: int) -> Tensor:
    """Map [N, C, h 2^levels, w 2^levels] in blocked order: [N, h w, 4^levels C], the coarser step outermost."""
    x = x.permute(0, 2, 3, 1)
    for _ in range(levels):
        # [N, H, W, *blocks, C]: the finest step, split off first, ends innermost.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, *range(5, x.dim() + 2))
    return x.flatten(1, 2).flatten(2)


def unblock(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Logits [N, K, h w 16] in blocked order as an image [N, K, 4 h, 4 w]."""
    blocked = masks.unflatten(2, (*grid, 2, 2, 2, 2))
    return blocked.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5, 7).flatten(2, 4)


def upscaled_masks(
    features: Tensor,
    high_res: tuple[Tensor, Tensor],
    hyper: Tensor,
    up1: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float],
    up2: tuple[Tensor, Tensor],
) -> Tensor:
    """Mask logits hyper GELU(up2 GELU(norm(up1 features + fine1)) + fine0) of N objects.

    Only the arguments are kept for the backward pass; the upscaled maps are computed again, a few objects at a time.

    Args:
        features: [N, h, w, dim].
        high_res: features of strides 4 and 8, [N or 1, dim/8, 4h, 4w] and [N or 1, dim/4, 2h, 2w].
        hyper: weights of K masks [N, K, dim/8].
        up1, up2: weights [in, out, 2, 2] and biases of the two transposed convolutions.
        norm: weight, bias and epsilon of the layer norm.

    Returns:
        [N, K, 4h, 4w] in the dtype of products.
    """
    dtype, grid = compute_dtype(features), features.shape[1:3]
    with without_autocast(features):
        # With the biases, so that neither is added for each object.
        fine0 = block(high_res[0].to(dtype) + up2[1].to(dtype)[:, None, None], 2)
        fine1 = block(high_res[1].to(dtype) + up1[1].to(dtype)[:, None, None], 1)
        matrices = [weight.permute(0, 2, 3, 1).flatten(1) for weight, _ in (up1, up2)]
        masks = _UpscaledMasks.apply(features.flatten(1, 2), fine0, fine1, hyper.to(dtype), *matrices, *norm)
    return unblock(masks, grid)


class _UpscaledMasks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        features: Tensor,
        fine0: Tensor,
        fine1: Tensor,
        hyper: Tensor,
        matrix1: Tensor,
        matrix2: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(features, fine0, fine1, hyper, matrix1, matrix2, weight, bias)
        ctx.eps = eps
        layers = [x.to(hyper.dtype) for x in (matrix1, matrix2, weight, bias)]
        masks = None
        for chunk in _chunks(features, fine0):
            inputs = (part(x, chunk) for x in (features, fine0, fine1))
            *_, last = _upscale(*inputs, *layers, eps)
            masks = with_part(masks, chunk, hyper[chunk] @ F.gelu(last).mT, len(hyper))
        return masks

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        features, fine0, fine1, hyper, *params = saved
        matrix1, matrix2, weight, bias = (x.to(hyper.dtype) for x in params)
        grad_features, grad_fine0, grad_fine1 = empty_total(features), empty_total(fine0), empty_total(fine1)
        grad_hyper, count = None, len(hyper)
        grad_matrix1, grad_matrix2, grad_weight, grad_bias = map(zero_total, params)
        with without_autocast(features):
            for chunk in _chunks(features, fine0):
                inputs = (part(x, chunk) for x in (features, fine0, fine1))
                rows, summed, hidden, statistics, last = _upscale(*inputs, matrix1, matrix2, weight, bias, ctx.eps)
                grad_hyper = with_part(grad_hyper, chunk, grad[chunk] @ F.gelu(last), count)
                grad_last = torch.ops.aten.gelu_backward(grad[chunk].mT @ hyper[chunk], last)
                del last
                of_fine0 = grad_last.view(len(rows), *fine0.shape[1:])
                grad_fine0 = with_gradient(grad_fine0, chunk, of_fine0, fine0, count)
                del of_fine0
                grad_last = grad_last.view(len(rows), hidden.shape[1], -1)
                grad_matrix2 += hidden.flatten(0, 1).T @ grad_last.flatten(0, 1)
                del hidden
                grad_hidden = (grad_last @ matrix2.T).view_as(summed)
                del grad_last
                grad_summed, *grads = layer_norm_backward(
                    grad_hidden, summed, weight, bias, ctx.eps, gelu=True, statistics=statistics
                )
                del grad_hidden
                grad_weight += grads[0]
                grad_bias += grads[1]
                grad_summed = grad_summed.view(len(rows), *fine1.shape[1:])
                grad_fine1 = with_gradient(grad_fine1, chunk, grad_summed, fine1, count)
                grad_matrix1 += rows.flatten(0, 1).T @ grad_summed.flatten(0, 1)
                grad_features = with_gradient(grad_features, chunk, grad_summed @ matrix1.T, features, count)
        grads = (grad_features, grad_fine0, grad_fine1, grad_hyper, grad_matrix1, grad_matrix2, grad_weight, grad_bias)
        return *(grad.to(x.dtype) for grad, x in zip(grads, saved, strict=True)), None


def _chunks(features: Tensor, fine0: Tensor) -> Iterator[slice]:
    return object_chunks(len(features), fine0[0].numel(), features.device.type)


def _upscale(
    features: Tensor,
    fine0: Tensor,
    fine1: Tensor,
    matrix1: Tensor,
    matrix2: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """The rows of a chunk, and the steps to the map before the last GELU [n, 16 h w, dim/8]: what is normalized, what
    the first GELU gives, mean and reciprocal deviation."""
    rows = features.to(matrix1.dtype)
    summed = (rows @ matrix1).add_(fine1).view(len(rows), -1, len(weight))  # [n, 4 h w, dim/4]
    hidden, *statistics = normalize(summed, weight, bias, eps, gelu=True)
    last = (hidden @ matrix2).view(len(rows), *fine0.shape[1:]).add_(fine0)
    return rows, summed, hidden, statistics, last.view(len(rows), 4 * summed.shape[1], -1)
