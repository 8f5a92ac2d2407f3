"""Ground truth of layer norm, by PyTorch's own operators. Any floating dtype, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized rows of x [R, C] in `dtype`, their means and reciprocal deviations [R]."""
    x, weight, bias = _operands(x.to(torch.promote_types(x.dtype, dtype)), weight, bias)
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return (F.gelu(y) if gelu else y).to(dtype), mean.flatten(), rstd.flatten()


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; the latter two in at least float32. Means and reciprocal deviations are computed
    where they are not given."""
    x, scale, shift = _operands(x, weight, bias)
    if mean is None or rstd is None:
        _, mean, rstd = torch.native_layer_norm(x, weight.shape, scale, shift, eps)
    grad, mean, rstd = grad.to(x.dtype), mean.view(-1, 1), rstd.view(-1, 1)
    if gelu:
        normed = ((x - mean) * rstd * scale + shift).to(x.dtype)
        grad = torch.ops.aten.gelu_backward(grad, normed)
    grad_x, *grads = torch.ops.aten.native_layer_norm_backward(
        grad, x, list(weight.shape), mean, rstd, scale, shift, [True, True, True]
    )
    return grad_x, *grads


def _operands(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters in the precision of statistics, which is float32 at least."""
    computed = torch.promote_types(x.dtype, torch.float32)
    return x, weight.to(computed), bias.to(computed)
