"""Ground truth of the fused dropouts. Any floating dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .hash import random_bits, threshold


def _dropped(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """x [R, C] with dropout, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if dropout == 0:
        return x
    keep = random_bits(seed, *x.shape) >= threshold(dropout)
    return torch.where(keep, x / (1 - dropout), 0.0)


def relu_dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """See `op.relu_dropout`; x [R, C]."""
    return _dropped(x.relu(), dropout, seed).to(x.dtype)


def relu_dropout_backward(grad: Tensor, out: Tensor, dropout: float) -> Tensor:
    """Gradient of x: the result is above 0 where x was and was kept."""
    computed = torch.promote_types(grad.dtype, torch.float32)
    return torch.where(out > 0, grad.to(computed) / (1 - dropout), 0.0).to(out.dtype)


def dropout_add(residual: Tensor, x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """See `op.dropout_add`; both [R, C]."""
    return (residual + _dropped(x, dropout, seed)).to(residual.dtype)


def dropout_add_backward(grad: Tensor, dropout: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of x, of `dtype`, from that of the sum."""
    return _dropped(grad, dropout, seed).to(dtype)
