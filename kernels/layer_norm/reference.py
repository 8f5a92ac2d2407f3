"""Ground truth of layer norm, by PyTorch's own operators. Any floating dtype, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized rows of x [R, C] in `dtype`, their means and reciprocal deviations [R]."""
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return (F.gelu(y) if gelu else y).to(dtype), mean.flatten(), rstd.flatten()


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; the latter two in at least float32. Means and reciprocal deviations are computed
    where they are not given."""
    scale, shift = weight.to(x.dtype), bias.to(x.dtype)
    if mean is None or rstd is None:
        _, mean, rstd = torch.native_layer_norm(x, weight.shape, scale, shift, eps)
    grad, mean, rstd = grad.to(x.dtype), mean.view(-1, 1), rstd.view(-1, 1)
    if gelu:
        normed = ((x - mean) * rstd * scale + shift).to(x.dtype)
        grad = torch.ops.aten.gelu_backward(grad, normed)
    grad_x, *grads = torch.ops.aten.native_layer_norm_backward(
        grad, x, list(weight.shape), mean, rstd, scale, shift, [True, True, True]
    )
    computed = torch.promote_types(x.dtype, torch.float32)
    return grad_x, *(value.to(computed) for value in grads)
