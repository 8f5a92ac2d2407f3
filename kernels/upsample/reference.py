"""Ground truth of the fused upsampling: one full-resolution pass for each step of it. Any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask_loss.reference import upsample as bilinear


def respond(full: Tensor, activation: int, scale: float, bias: float) -> Tensor:
    """activation(full) * scale + bias; `activation` is 0 for none, 1 for the sigmoid, 2 for 1 where above 0, else 0."""
    if activation == 1:
        full = full.sigmoid()
    elif activation == 2:
        full = (full > 0).to(full.dtype)
    return full * scale + bias


def upsample(logits: Tensor, factor: int, activation: int, scale: float, bias: float, dtype: torch.dtype) -> Tensor:
    """See `op.upsample`; arithmetic in float64 for float64 logits, else in float32."""
    return respond(bilinear(logits, factor * logits.shape[-2]), activation, scale, bias).to(dtype)


def upsample_backward(grad: Tensor, logits: Tensor, factor: int, activation: int, scale: float) -> Tensor:
    """Gradient of `logits`, in their dtype, from that of the result: the upsampling transposed.

    The slope of the sigmoid p is p (1 - p); that of `binary` is taken as 0.
    """
    if activation == 2:
        return logits.new_zeros(logits.shape)
    slope = scale
    if activation == 1:
        full = bilinear(logits, factor * logits.shape[-2])
        slope = scale * full.sigmoid() * torch.sigmoid(-full)
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    planes, (height, width) = (grad.to(computed) * slope).flatten(0, 1).unsqueeze(1), logits.shape[-2:]
    transposed = torch.ops.aten.upsample_bilinear2d_backward(
        planes, planes.shape[-2:], [len(planes), 1, height, width], False
    )
    return transposed.view(logits.shape).to(logits.dtype)
