"""`relu_dropout` and `dropout_add`: dropout in one pass with the ReLU before it or the sum after it.

The operators `sam2fast::relu_dropout`, `sam2fast::dropout_add` and their gradients carry them. No mask is stored: what
is dropped follows from a seed and the place of an element (hash.py). Cost: README.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import library
from . import reference
from .hash import draw_seed, threshold


def relu_dropout(x: Tensor, dropout: float, *, seed: Tensor | None = None, backend: library.Backend = "auto") -> Tensor:
    """dropout(relu(x)); of both, the backward pass needs nothing but the result.

    Args:
        x: [..., C], float32, bfloat16 or float16 (float64 runs on the reference).
        dropout: probability that an element becomes 0; the others are divided by 1 - dropout.
        seed: int64 scalar on the device of x, which determines what is dropped, the same in every back end; None draws
            one from torch's global generator.
        backend: `auto` takes `cpp` for CPU and `triton` for CUDA tensors where they are installed.

    Raises:
        ValueError: a shape, dtype or probability that cannot be.
    """
    _check(x, dropout)
    run = relu_dropout_forward.choose(backend, x)
    return run(_rows(x), float(dropout), _seed(seed, x, dropout)).view(x.shape)


def dropout_add(
    residual: Tensor, x: Tensor, dropout: float, *, seed: Tensor | None = None, backend: library.Backend = "auto"
) -> Tensor:
    """residual + dropout(x), in the dtype of `residual`.

    Args:
        residual, x: [..., C] of one shape, which may differ in dtype; see `relu_dropout` for the rest.

    Raises:
        ValueError: a shape, dtype or probability that cannot be.
    """
    _check(x, dropout)
    if residual.shape != x.shape or not residual.is_floating_point():
        raise ValueError(
            f"residual must be floating point of the shape of x, {list(x.shape)}, not {residual.dtype} "
            f"{list(residual.shape)}"
        )
    run = dropout_add_forward.choose(backend, residual if residual.dtype == torch.float64 else x)
    return run(_rows(residual), _rows(x), float(dropout), _seed(seed, x, dropout)).view(x.shape)


def _check(x: Tensor, dropout: float) -> None:
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be floating point [..., C], not {x.dtype} {list(x.shape)}")
    threshold(dropout)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _seed(seed: Tensor | None, x: Tensor, dropout: float) -> Tensor:
    if seed is not None:
        return seed
    return draw_seed(x.device) if dropout else torch.zeros((), dtype=torch.int64, device=x.device)


def _fake(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _fake_relu_backward(_, out: Tensor, __) -> Tensor:
    return out.new_empty(out.shape)


def _fake_add_backward(grad: Tensor, _, __, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _setup_relu(ctx, inputs, output) -> None:
    ctx.dropout = inputs[1]
    ctx.save_for_backward(output)


def _backward_relu(ctx, run, grad: Tensor) -> tuple[Tensor, None, None]:
    (out,) = ctx.saved_tensors
    return run(grad.contiguous(), out, ctx.dropout), None, None


def _setup_add(ctx, inputs, output) -> None:
    _, x, ctx.dropout, seed = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(seed)


def _backward_add(ctx, run, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return grad, run(grad.contiguous(), ctx.dropout, seed, ctx.dtype), None, None


_OPTIONS = {"kernel_dtypes": library.KERNEL_DTYPES, "slower": "in several passes"}

relu_dropout_forward = library.Operator(
    "relu_dropout",
    "(Tensor x, float dropout, Tensor seed) -> Tensor",
    reference=reference.relu_dropout,
    fake=_fake,
    triton=library.lazy(__package__, "triton:relu_dropout"),
    **_OPTIONS,
)
relu_dropout_backward = library.Operator(
    "relu_dropout_backward",
    "(Tensor grad, Tensor out, float dropout) -> Tensor",
    reference=reference.relu_dropout_backward,
    fake=_fake_relu_backward,
    triton=library.lazy(__package__, "triton:relu_dropout_backward"),
)
relu_dropout_forward.differentiate(relu_dropout_backward, _backward_relu, _setup_relu)

dropout_add_forward = library.Operator(
    "dropout_add",
    "(Tensor residual, Tensor x, float dropout, Tensor seed) -> Tensor",
    reference=reference.dropout_add,
    fake=_fake,
    triton=library.lazy(__package__, "triton:dropout_add"),
    **_OPTIONS,
)
dropout_add_backward = library.Operator(
    "dropout_add_backward",
    "(Tensor grad, float dropout, Tensor seed, ScalarType dtype) -> Tensor",
    reference=reference.dropout_add_backward,
    fake=_fake_add_backward,
    triton=library.lazy(__package__, "triton:dropout_add_backward"),
)
dropout_add_forward.differentiate(dropout_add_backward, _backward_add, _setup_add)
