"""Triton kernels of layer norm; reference.py is the ground truth.

A program has several rows at a time, each within one tile, so that every element is read once and written once. In the
backward pass a program goes through many blocks of rows and keeps its share of the gradients of weight and bias in
registers; the shares are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, multiprocessors

FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 4096, 2048
"""Of a tile."""
PROGRAMS_OF_A_MULTIPROCESSOR = 4
"""Of the backward kernel."""
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _load(x, rows, valid, count, COLUMNS: tl.constexpr):
    """x[rows, :count] in float32, zeros beyond."""
    columns = tl.arange(0, COLUMNS)
    places = rows.to(tl.int64)[:, None] * count + columns[None, :]
    return tl.load(x + places, mask=valid[:, None] & (columns < count)[None, :], other=0).to(tl.float32)


@triton.jit
def _store(x, rows, valid, count, tile, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    places = rows.to(tl.int64)[:, None] * count + columns[None, :]
    tl.store(x + places, tile.to(x.dtype.element_ty), mask=valid[:, None] & (columns < count)[None, :])


@triton.jit
def _normalized(x, row, valid, eps, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows less their means over their deviations, means, reciprocal deviations."""
    tile = _load(x, row, valid, COUNT, COLUMNS)
    mean = tl.sum(tile, 1) / COUNT
    centered = tl.where((tl.arange(0, COLUMNS) < COUNT)[None, :], tile - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / COUNT + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit(do_not_specialize=("rows",))
def forward_kernel(
    x, weight, bias, y, mean, rstd, rows, eps, COUNT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of y [R, COUNT], mean and rstd [R]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    columns = tl.arange(0, COLUMNS)
    inside = columns < COUNT
    normed, average, factor = _normalized(x, row, valid, eps, COUNT, COLUMNS)
    scale = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    out = normed * scale[None, :] + shift[None, :]
    if GELU:
        out = 0.5 * out * (1 + tl.erf(out * SQRT_HALF))
    _store(y, row, valid, COUNT, out, COLUMNS)
    tl.store(mean + row, average, mask=valid)
    tl.store(rstd + row, factor, mask=valid)


@triton.jit(do_not_specialize=("rows",))
def backward_kernel(
    grad, x, weight, bias, grad_x, shares, rows, eps, COUNT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """Rows of grad_x [R, COUNT], and this program's shares [programs, 2, COUNT] of the gradients of weight and bias."""
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < COUNT
    scale = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < rows
        normed, _, factor = _normalized(x, row, valid, eps, COUNT, COLUMNS)
        slope = _load(grad, row, valid, COUNT, COLUMNS)
        if GELU:
            out = normed * scale[None, :] + shift[None, :]
            density = INV_SQRT_2PI * tl.exp(-0.5 * out * out)
            slope *= 0.5 * (1 + tl.erf(out * SQRT_HALF)) + out * density
        of_weight += slope * normed
        of_bias += slope
        slope *= scale[None, :]
        along = tl.sum(slope * normed, 1) / COUNT
        average = tl.sum(slope, 1) / COUNT
        result = (slope - normed * along[:, None] - average[:, None]) * factor[:, None]
        _store(grad_x, row, valid, COUNT, result, COLUMNS)
    shares += program * 2 * COUNT + columns
    tl.store(shares, tl.sum(of_weight, 0), mask=inside)
    tl.store(shares + COUNT, tl.sum(of_bias, 0), mask=inside)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.layer_norm`."""
    launch = forward_launch(x, weight, bias, eps, gelu, dtype)
    launch.run()
    return launch.arguments["y"], launch.arguments["mean"], launch.arguments["rstd"]


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `reference.layer_norm_backward`; the statistics follow from rows that are read anyway."""
    launch = backward_launch(grad, x, weight, bias, eps, gelu)
    launch.run()
    grad_weight, grad_bias = (shares.sum(0) for shares in launch.arguments["shares"].unbind(1))
    return launch.arguments["grad_x"], grad_weight, grad_bias


def forward_launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, dtype: torch.dtype) -> Launch:
    """Leaves `y`, `mean` and `rstd`."""
    shape = _shape(x, FORWARD_ELEMENTS)
    outputs = {"y": torch.empty_like(x, dtype=dtype)} | {
        name: x.new_empty(len(x), dtype=torch.float32) for name in ("mean", "rstd")
    }
    arguments = {"x": x, "weight": weight, "bias": bias, "eps": eps, "GELU": gelu} | shape | outputs
    return Launch(forward_kernel, triton.cdiv(len(x), shape["ROWS"]), arguments)


def backward_launch(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Launch:
    """Leaves `grad_x`, and `shares` [programs, 2, C] of the gradients of weight and bias."""
    shape = _shape(x, BACKWARD_ELEMENTS)
    most = multiprocessors(x) * PROGRAMS_OF_A_MULTIPROCESSOR
    programs = min(most, triton.cdiv(len(x), shape["ROWS"]))
    inputs = {"grad": grad, "x": x, "weight": weight, "bias": bias, "eps": eps, "GELU": gelu}
    shares = x.new_empty((programs, 2, x.shape[1]), dtype=torch.float32)
    return Launch(backward_kernel, programs, inputs | shape | {"grad_x": torch.empty_like(x), "shares": shares})


def _shape(x: Tensor, elements: int) -> dict[str, int]:
    columns = triton.next_power_of_2(x.shape[1])
    return {"rows": len(x), "COUNT": x.shape[1], "COLUMNS": columns, "ROWS": max(1, elements // columns)}
