"""Linear layers of the trunk that keep less for the backward pass and move less in it.

Both compute what an `nn.Linear` and its neighbor compute. Each owns the parameters that it reads, so that an engine may
gather them around its call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layers import compute_dtype

CHUNK_BYTES = 4 * 2**20
"""Of activations that a CPU keeps in its cache between two operations."""


class SplitLinear(nn.Linear):
    """A linear layer whose output is wanted in three equal parts.

    Its backward pass takes the gradients of the parts as they come, where `unbind` would first copy them into one.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., in] to three [..., out / 3]."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        return _Split.apply(*_as_autocast(x, self.weight, self.bias))


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


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the precision of autocast where it is on, as it does for the operands of `F.linear`."""
    dtype = compute_dtype(tensors[0])
    return tuple(tensor.to(dtype) if tensor.dtype != torch.float64 else tensor for tensor in tensors)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias).chunk(3, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        parts = [grad.flatten(0, -2) for grad in grads]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            rows = weight.chunk(3)
            grad_x = parts[0] @ rows[0]
            grad_x.addmm_(parts[1], rows[1]).addmm_(parts[2], rows[2])
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight, flat = torch.empty_like(weight), x.flatten(0, -2)
            for part, rows in zip(parts, grad_weight.chunk(3), strict=True):
                torch.mm(part.t(), flat, out=rows)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.cat([part.sum(dim=0) for part in parts])
        return grad_x, grad_weight, grad_bias


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
