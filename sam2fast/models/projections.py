"""Linear layers that keep less for the backward pass and move less in it.

All compute what an `nn.Linear` and its neighbors compute. What is read of other modules is handed over (`layers.lend`),
so that an engine may gather the parameters of each module around its call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sam2fast_kernels.layer_norm import layer_norm_backward, normalize

from .layers import LayerNorm, LayerNorm2d, compute_dtype, lend, without_autocast

CHUNK_BYTES = 4 * 2**20
"""Of activations that a CPU keeps in its cache between two operations."""


class NormedLinear(nn.Linear):
    """A linear layer that normalizes its input itself, and keeps the input as it was before; see `normed_linear`."""

    def forward(
        self, x: Tensor | None = None, norm: LayerNorm | LayerNorm2d | None = None, parts: int = 1
    ) -> tuple[Tensor, ...]:
        """[..., in] to `parts` of [..., out / parts], normalized by the parameters of `norm` if it is given; without an
        input weight and bias, see `Lending`."""
        return lend(self) if x is None else normed_linear(x, norm, self.weight, self.bias, parts)


class GeluLinear(nn.Linear):
    """GELU and a linear layer after it; the output of the GELU is computed again, not kept."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in], before the GELU, to [..., out]."""
        if torch.compiler.is_compiling():  # the compiler decides itself what to keep
            return F.linear(F.gelu(x), self.weight, self.bias)
        return _Gelu.apply(*_as_autocast(x, self.weight, self.bias))


def adopt(kind: type[nn.Linear], linear: nn.Linear) -> nn.Linear:
    """A layer of class `kind` that takes over the parameters of `linear`."""
    layer = kind(linear.in_features, linear.out_features, device="meta")
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer


def adopt_norm(norm: nn.LayerNorm) -> LayerNorm:
    """A LayerNorm that lends the parameters of `norm`."""
    layer = LayerNorm(norm.normalized_shape, norm.eps, device="meta")
    layer.weight, layer.bias = norm.weight, norm.bias
    return layer


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the precision of autocast where it is on, as it does for the operands of `F.linear`."""
    dtype = compute_dtype(tensors[0])
    return tuple(tensor.to(dtype) if tensor.dtype != torch.float64 else tensor for tensor in tensors)


def normed_linear(
    x: Tensor,
    norm: LayerNorm | LayerNorm2d | None,
    weight: Tensor,
    bias: Tensor,
    parts: int = 1,
) -> tuple[Tensor, ...]:
    """LayerNorm, then a linear map whose output is wanted in equal parts.

    Kept for the backward pass is x alone, in its own dtype; the normalized tokens are computed again. The gradients of
    the parts are taken as they come, where `chunk` would first copy them into one.

    Args:
        x: [M, L, in].
        norm: lends its parameters; None for no normalization.
        weight: [out, in].
        bias: [out].

    Returns:
        `parts` tensors [M, L, out / parts], in the precision of autocast where it is on.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        y = F.layer_norm(x, norm.weight.shape, *norm(), norm.eps) if norm is not None else x
        return F.linear(y, weight, bias).chunk(parts, dim=-1)
    dtype = x.dtype if x.dtype == torch.float64 else compute_dtype(x)
    (scale, shift), eps = (norm(), norm.eps) if norm is not None else ((None, None), 0.0)
    return _NormedLinear.apply(x, scale, shift, weight, bias, eps, parts, dtype)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        parts: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, scale, shift, weight, bias)
        ctx.eps, ctx.dtype = eps, dtype
        with without_autocast(x):
            y = x.to(dtype) if scale is None else normalize(x, scale, shift, eps, dtype=dtype)[0]
            return F.linear(y, weight.to(dtype), bias.to(dtype)).chunk(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, bias = saved = ctx.saved_tensors
        with without_autocast(x):
            if scale is None:
                y = x.to(ctx.dtype)
            else:
                y, *statistics = normalize(x, scale, shift, ctx.eps, dtype=ctx.dtype)
            parts, rows = [grad.flatten(0, -2) for grad in grads], weight.to(ctx.dtype).chunk(len(grads))
            found: list[Tensor | None] = [None] * 5
            if any(ctx.needs_input_grad[:3]):
                grad = _sum_of_products(parts, rows).view_as(y)
                found[0] = grad
                if scale is not None:
                    found[:3] = layer_norm_backward(grad, x, scale, shift, ctx.eps, statistics=statistics)
            if ctx.needs_input_grad[3]:
                found[3] = _stacked_products(parts, y.flatten(0, -2))
            if ctx.needs_input_grad[4]:
                found[4] = torch.cat([part.sum(dim=0) for part in parts])
        inputs = zip(found, saved, strict=True)
        return *(None if grad is None else grad.to(of.dtype) for grad, of in inputs), None, None, None


def _sum_of_products(parts: list[Tensor], rows: tuple[Tensor, ...]) -> Tensor:
    out = parts[0] @ rows[0]
    for part, row in zip(parts[1:], rows[1:], strict=True):
        out.addmm_(part, row)
    return out


def _stacked_products(parts: list[Tensor], y: Tensor) -> Tensor:
    """The products part^T y below each other."""
    out = y.new_empty(sum(part.shape[1] for part in parts), y.shape[1])
    for part, rows in zip(parts, out.chunk(len(parts)), strict=True):
        torch.mm(part.t(), y, out=rows)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        flat = x.flatten(0, -2)
        out = flat.new_empty(len(flat), len(weight))
        buffer = None
        for rows in _chunks(flat):
            buffer = _gelu(flat[rows], buffer)
            torch.addmm(bias, buffer, weight.t(), out=out[rows])
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat, grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        buffer = None
        for rows in _chunks(flat):
            if grad_weight is not None:
                buffer = _gelu(flat[rows], buffer)
                grad_weight.addmm_(grad[rows].t(), buffer)
            if grad_x is not None:
                part = torch.mm(grad[rows], weight, out=grad_x[rows])
                torch.ops.aten.gelu_backward.grad_input(part, flat[rows], grad_input=part)
        grad_bias = grad.sum(dim=0) if ctx.needs_input_grad[2] else None
        return None if grad_x is None else grad_x.view_as(x), grad_weight, grad_bias


def _gelu(x: Tensor, buffer: Tensor | None) -> Tensor:
    out = torch.empty_like(x) if buffer is None else buffer[: len(x)]
    return torch.ops.aten.gelu.out(x, out=out)


def _chunks(x: Tensor) -> list[slice]:
    """Rows to take at once: all of them, but what fits into the cache on a CPU.

    In low precision too, all of them: the weight gradient is summed over the chunks in its own precision.
    """
    rows = max(len(x), 1)
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        rows = max(CHUNK_BYTES // (x.shape[1] * x.element_size()), 128)
    return [slice(start, start + rows) for start in range(0, len(x), rows)]
