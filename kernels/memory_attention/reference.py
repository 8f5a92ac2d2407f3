"""Ground truth of memory attention, with the whole score matrix in memory. Any floating dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout.hash import random_bits, threshold


def rotate(x: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int = 0, inverse: bool = False) -> Tensor:
    """Rotate neighboring channels (a, b) of x [N, L, D] to (a cos - b sin, a sin + b cos).

    Row i takes the angles of row i modulo hw of the tables [hw, D / 2]; empty tables and the last `num_unrotated` rows
    do not rotate. Computed in the precision of the tables or of x, whichever is higher; returned in the dtype of x.
    """
    if not len(cos):
        return x
    placed = x.shape[1] - num_unrotated
    index = torch.arange(placed, device=x.device) % len(cos)
    cos, sin = cos[index], -sin[index] if inverse else sin[index]
    a, b = x[:, :placed].unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([rotated, x[:, placed:]], dim=1)


def _factors(scores: Tensor, dropout: float, seed: Tensor) -> Tensor | float:
    """What each probability is multiplied with: 0 or 1 / (1 - dropout)."""
    if dropout == 0:
        return 1.0
    n, length, keys = scores.shape
    keep = random_bits(seed, n * length, keys).view(n, length, keys) >= threshold(dropout)
    return keep.to(scores.dtype) / (1 - dropout)


def _scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores [N, L, M] in at least float32, and the rotated queries and keys."""
    computed = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = rotate(q, cos, sin).to(computed), rotate(k, cos, sin, num_unrotated).to(computed)
    return q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, q, k


def memory_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.memory_attention`; also the logarithm of each row's sum of exponentials [N, L]."""
    scores, _, _ = _scores(q, k, cos, sin, num_unrotated)
    weights = scores.softmax(-1) * _factors(scores, dropout, seed)
    out = (weights @ v.to(weights.dtype)).to(v.dtype)
    return out, weights.sum(-1), scores.logsumexp(-1)


def memory_attention_backward(
    grad_out: Tensor,
    grad_row_sum: Tensor,
    out: Tensor,
    row_sum: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_unrotated: int,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes."""
    scores, turned_q, turned_k = _scores(q, k, cos, sin, num_unrotated)
    probabilities, factors = torch.exp(scores - lse.unsqueeze(-1)), _factors(scores, dropout, seed)
    upstream = grad_out.to(scores.dtype)
    slope = (upstream @ v.to(scores.dtype).transpose(1, 2) + grad_row_sum.unsqueeze(-1)) * factors
    delta = (upstream * out).sum(-1) + grad_row_sum * row_sum
    slope = probabilities * (slope - delta.unsqueeze(-1)) * q.shape[-1] ** -0.5
    grad_q = rotate((slope @ turned_k).to(q.dtype), cos, sin, inverse=True)
    grad_k = rotate((slope.transpose(1, 2) @ turned_q).to(k.dtype), cos, sin, num_unrotated, inverse=True)
    grad_v = (probabilities * factors).transpose(1, 2) @ upstream
    return grad_q, grad_k, grad_v.to(v.dtype)
