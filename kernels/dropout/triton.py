"""Triton kernels of the fused dropouts; reference.py is the ground truth. A program has one block of one tensor's
elements, row-major."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from .hash import threshold

BLOCK = 1024
"""Elements of a program."""


@triton.jit
def mix(x):
    """Mix uint32 bits, as hash.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_key(seed, row):
    """Key of a row (any integer type) for `random_bits`; `seed` is an int64 scalar."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(mix(low ^ (row & 0xFFFFFFFF).to(tl.uint32)) + high)


@triton.jit
def random_bits(key, column):
    """Bits of an element of the row of `key`."""
    return mix(key + column.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def _dropped(x, seed, at, columns, limit, scale, DROPS: tl.constexpr):
    """Float32 elements `at` (int64) with dropout."""
    if DROPS:
        bits = random_bits(row_key(tl.load(seed), at // columns), at % columns)
        x = tl.where(bits >= limit.to(tl.uint32), x * scale, 0.0)
    return x


@triton.jit
def forward_kernel(
    residual, x, out, seed, count, columns, limit, scale,
    ADDS: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x) with `ADDS`, else dropout(relu(x))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if not ADDS:
        value = tl.where(value < 0, 0.0, value)  # keeps NaN
    value = _dropped(value, seed, at, columns, limit, scale, DROPS)
    if ADDS:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def drop_kernel(x, out, seed, count, columns, limit, scale, DROPS: tl.constexpr, BLOCK: tl.constexpr):
    """dropout(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = _dropped(value, seed, at, columns, limit, scale, DROPS)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def relu_backward_kernel(grad, result, out, count, scale, BLOCK: tl.constexpr):
    """grad * scale where the result of the forward pass is above 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * scale
    slope = tl.where(tl.load(result + at, mask=inside, other=0.0) > 0, slope, 0.0)
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=inside)


def _options(x: Tensor, dropout: float, seed: Tensor) -> dict[str, object]:
    return {
        "x": x,
        "seed": seed,
        "count": x.numel(),
        "columns": x.shape[1],
        "limit": threshold(dropout),
        "scale": 1 / (1 - dropout),
        "DROPS": dropout > 0,
        "BLOCK": BLOCK,
    }


def forward_launch(residual: Tensor | None, x: Tensor, dropout: float, seed: Tensor) -> Launch:
    out = torch.empty_like(x if residual is None else residual)
    arguments = _options(x, dropout, seed) | {"residual": x if residual is None else residual, "out": out}
    return Launch(forward_kernel, triton.cdiv(x.numel(), BLOCK), arguments | {"ADDS": residual is not None})


def drop_launch(x: Tensor, dropout: float, seed: Tensor, dtype: torch.dtype) -> Launch:
    arguments = _options(x, dropout, seed) | {"out": torch.empty_like(x, dtype=dtype)}
    return Launch(drop_kernel, triton.cdiv(x.numel(), BLOCK), arguments)


def relu_backward_launch(grad: Tensor, result: Tensor, dropout: float) -> Launch:
    arguments = {"grad": grad, "result": result, "out": torch.empty_like(result), "count": grad.numel()}
    arguments |= {"scale": 1 / (1 - dropout), "BLOCK": BLOCK}
    return Launch(relu_backward_kernel, triton.cdiv(grad.numel(), BLOCK), arguments)


def _run(launch: Launch) -> Tensor:
    launch.run()
    return launch.arguments["out"]


def relu_dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return _run(forward_launch(None, x, dropout, seed))


def relu_dropout_backward(grad: Tensor, out: Tensor, dropout: float) -> Tensor:
    return _run(relu_backward_launch(grad, out, dropout))


def dropout_add(residual: Tensor, x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return _run(forward_launch(residual, x, dropout, seed))


def dropout_add_backward(grad: Tensor, dropout: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    return _run(drop_launch(grad, dropout, seed, dtype))
