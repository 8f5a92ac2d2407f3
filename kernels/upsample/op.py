"""`upsample`: low-resolution mask logits at full resolution, with activation, scale and cast, in one pass.

The operators `sam2fast::upsample` and `sam2fast::upsample_backward` carry it. Numerics and cost: README.md.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import library
from . import reference

Activation = Literal["none", "sigmoid", "binary"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
"""The operators take the place in this list."""


def upsample(
    logits: Tensor,
    factor: int,
    *,
    activation: Activation = "none",
    scale: float = 1.0,
    bias: float = 0.0,
    dtype: torch.dtype | None = None,
    backend: library.Backend = "auto",
) -> Tensor:
    """activation(logits at full resolution) * scale + bias; nothing but the result is stored.

    Bilinear upsampling, align_corners=False. The memory encoder of SAM 2 takes sigmoid * 20 - 10 (arXiv 2408.00714 and
    the official configurations).

    Args:
        logits: [N, M, h, w], float32, bfloat16 or float16 (float64 runs on the reference), any strides. All arithmetic
            is in float32, and the result is rounded once.
        factor: pixels that a logit spans a side, at least 1.
        activation: `binary` is 1 where the upsampled logit is above 0, else 0; its gradient is 0.
        dtype: float32, bfloat16, float16 or float64 (which computes in float64); None takes float32, and float64 for
            float64 logits.
        backend: `auto` takes `cpp` for CPU and `triton` for CUDA tensors where they are installed.

    Returns:
        [N, M, factor * h, factor * w], contiguous. Its gradient is recomputed from the logits, all that is saved.

    Raises:
        ValueError: a shape, dtype or option that cannot be.
    """
    _check(logits, factor, activation, scale, bias)
    if dtype is None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if dtype == torch.float64:
        logits = logits.double()
    elif dtype not in library.KERNEL_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype}")
    run = upsample_forward.choose(backend, logits)
    return run(logits, factor, ACTIVATIONS.index(activation), float(scale), float(bias), dtype)


def _check(logits: Tensor, factor: int, activation: str, scale: float, bias: float) -> None:
    if not logits.is_floating_point() or logits.dim() != 4 or 0 in logits.shape[2:]:
        raise ValueError(
            f"logits must be floating point [N, M, h, w] with h, w >= 1, not {logits.dtype} {list(logits.shape)}"
        )
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor must be a whole number of at least 1, not {factor!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if not (abs(scale) < math.inf and abs(bias) < math.inf):
        raise ValueError(f"scale and bias must be finite, not {scale!r} and {bias!r}")


def _fake(logits: Tensor, factor: int, activation: int, scale: float, bias: float, dtype: torch.dtype) -> Tensor:
    n, m, height, width = logits.shape
    return logits.new_empty((n, m, factor * height, factor * width), dtype=dtype)


def _fake_backward(grad: Tensor, logits: Tensor, *_) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output) -> None:
    logits, ctx.factor, ctx.activation, ctx.scale, _, _ = inputs
    ctx.save_for_backward(logits)


def _backward(ctx, run, grad: Tensor) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    return run(grad, logits, ctx.factor, ctx.activation, ctx.scale), None, None, None, None, None


def _flops(logits_shape: torch.Size, factor: int, activation: int, *_, **__) -> int:
    return FORWARD_FLOPS[activation] * math.prod(logits_shape) * factor**2


def _flops_backward(_, logits_shape: torch.Size, factor: int, activation: int, *__, **___) -> int:
    return BACKWARD_FLOPS[activation] * math.prod(logits_shape) * factor**2


FORWARD_FLOPS, BACKWARD_FLOPS = (5, 28, 6), (4, 32, 0)
"""Floating-point operations per pixel of the result for each activation, counted in README.md."""

upsample_forward = library.Operator(
    "upsample",
    "(Tensor logits, int factor, int activation, float scale, float bias, ScalarType dtype) -> Tensor",
    reference=reference.upsample,
    fake=_fake,
    triton=library.lazy(__package__, "triton:upsample"),
    kernel_dtypes=library.KERNEL_DTYPES,
    flops=_flops,
    slower="several times slower and with full-resolution copies",
)
upsample_backward = library.Operator(
    "upsample_backward",
    "(Tensor grad, Tensor logits, int factor, int activation, float scale) -> Tensor",
    reference=reference.upsample_backward,
    fake=_fake_backward,
    triton=library.lazy(__package__, "triton:upsample_backward"),
    flops=_flops_backward,
)
upsample_forward.differentiate(upsample_backward, _backward, _setup_context)
