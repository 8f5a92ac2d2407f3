"""Layers that several parts of SAM 2 share."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from sam2fast_kernels.layer_norm import layer_norm_backward, normalize


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with `x` computes in: the dtype of autocast where that is on."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A region that computes in the dtypes it is given, on the device of `x`."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def fold_projections(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight W2 W1 [out, in] and bias W2 b1 [out] of two linear maps in succession; the bias of the second is left out.

    In the precision of the weights: autocast then rounds their product alone.
    """
    (weight1, bias1), (weight2, _) = first, second
    with without_autocast(weight1):
        return weight2 @ weight1, weight2 @ bias1


def lend(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer as views, which outlive gathered parameters."""
    return layer.weight.view_as(layer.weight), layer.bias.view_as(layer.bias)


class Lending:
    """A layer that, called without an input, returns its weight and bias, for a computation that merges layers.

    Called, rather than read, for the reason of `Learned`.
    """

    def forward(self, x: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return lend(self) if x is None else super().forward(x)


class Linear(Lending, nn.Linear):
    """See `Lending`."""


class Conv2d(Lending, nn.Conv2d):
    """See `Lending`."""


class ConvTranspose2d(Lending, nn.ConvTranspose2d):
    """See `Lending`."""


class LayerNorm(Lending, nn.LayerNorm):
    """See `Lending`."""


class LayerNorm2d(nn.Module):
    """Layer normalization over the channels of [N, C, h, w].

    Not an `nn.LayerNorm`: the official optimizer decays its parameters, unlike those of `nn.LayerNorm`.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if x is None:
            return lend(self)
        normalized = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normalized.permute(0, 3, 1, 2)

    def gelu(self, rows: Tensor) -> Tensor:
        """GELU of the normalized rows [..., C], in their dtype; only they are kept for the backward pass."""
        if torch.compiler.is_compiling():  # the compiler decides itself what to keep
            return _norm_gelu(rows, *self(), self.eps)
        return _NormGelu.apply(rows, *self(), self.eps)


def _norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    with without_autocast(x):
        return F.gelu(F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps))


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = normalize(x, weight, bias, eps, gelu=True)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = layer_norm_backward(
            grad, x, weight, bias, ctx.eps, gelu=True, statistics=(mean, rstd)
        )
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Learned(nn.Module):
    """A learned tensor of any shape.

    A module that is called, rather than a parameter that its owner reads: ZeRO-3 gathers the parameters of a module
    around its call, and again in the backward pass if the call returned a tensor.
    """

    def __init__(self, *shape: int, std: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * std)

    def forward(self) -> Tensor:
        return self.weight.view_as(self.weight)  # a view outlives the gathered parameter


class Attention(nn.Module):
    """Multi-head attention [N, Lq, dim] x [N, Lk, kv_dim] -> [N, Lq, dim] of a chosen inner width.

    Either side may have one row for all N; it is projected once.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        inner_dim: int | None = None,
        kv_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner_dim, kv_dim = inner_dim or dim, kv_dim or dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = Linear(dim, inner_dim)
        self.k_proj = Linear(kv_dim, inner_dim)
        self.v_proj = Linear(kv_dim, inner_dim)
        self.out_proj = Linear(inner_dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, L, inner / heads]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = max(len(q), len(k))
        heads = [self._heads(x).expand(rows, -1, -1, -1) for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))]
        return self._attend(*heads)
