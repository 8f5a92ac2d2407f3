"""`layer_norm`: normalization over the channels, alone or with the GELU after it, in one pass.

The operators `sam2fast::layer_norm` and `sam2fast::layer_norm_backward` carry it. Cost: README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library
from . import reference


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
    backend: library.Backend = "auto",
) -> Tensor:
    """LayerNorm over the last dimension (arXiv 1607.06450), then GELU where `gelu`: [..., C].

    Statistics and arithmetic are in float32, or in float64 for float64.

    Args:
        x: [..., C], float32, bfloat16 or float16 (float64 runs on the reference).
        weight, bias: [C], floating point.
        dtype: of the result; None is that of x.
        backend: `auto` takes `triton` for CUDA tensors where it is installed.

    Raises:
        ValueError: a shape or dtype that cannot be.
    """
    return normalize(x, weight, bias, eps, gelu=gelu, dtype=dtype, backend=backend)[0]


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
    backend: library.Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What `layer_norm` gives, with the means and reciprocal deviations of the rows [R] that `layer_norm_backward`
    can use: for autograd functions that call both themselves."""
    if not x.is_floating_point() or x.dim() < 1 or weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (x, weight, bias))
        raise ValueError(f"x, weight and bias must be floating point [..., C], [C] and [C], not {shapes}")
    y, mean, rstd = forward.choose(backend, x)(_rows(x), weight, bias, float(eps), gelu, dtype or x.dtype)
    return y.view(x.shape), mean, rstd


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    gelu: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
    backend: library.Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [..., C], in its dtype, and of weight and bias [C], in float32 at least.

    Args:
        grad: [..., C], of the result, in any floating dtype.
        statistics: the last two results of `normalize`, which spare the reference a pass.
    """
    mean, rstd = statistics or (None, None)
    run = backward.choose(backend, x)
    grad_x, *grads = run(_rows(grad), _rows(x), mean, rstd, weight, bias, float(eps), gelu)
    return grad_x.view(x.shape), *grads


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _fake(x: Tensor, _, __, ___, ____, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    numbers = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=dtype), numbers, torch.empty_like(numbers)


def _fake_backward(_, x: Tensor, *__) -> tuple[Tensor, Tensor, Tensor]:
    grad = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), grad, torch.empty_like(grad)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps, ctx.gelu, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, run, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = run(grad.contiguous(), x, mean, rstd, weight, bias, ctx.eps, ctx.gelu)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None, None


forward = library.Operator(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps, bool gelu, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm,
    fake=_fake,
    triton=library.lazy(__package__, "triton:layer_norm"),
    kernel_dtypes=library.KERNEL_DTYPES,
    slower="slower",
    compiled=False,
)
backward = library.Operator(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? mean, Tensor? rstd, Tensor weight, Tensor bias, float eps, bool gelu) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_backward,
    fake=_fake_backward,
    triton=library.lazy(__package__, "triton:layer_norm_backward"),
    kernel_dtypes=library.KERNEL_DTYPES,
    compiled=False,
)
forward.differentiate(backward, _backward, _setup_context)
