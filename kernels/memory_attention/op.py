"""`memory_attention`: one-head attention with rotary embedding and dropout, which stores no score.

The operators `sam2fast::memory_attention` and `sam2fast::memory_attention_backward` carry it. Derivation and cost:
README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library
from ..dropout.hash import draw_seed, threshold
from . import cpu, reference


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    num_unrotated: int = 0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    key_projection: tuple[Tensor, Tensor] | None = None,
    backend: library.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """out = dropout(softmax(q k^T / sqrt(D))) v, and the row sums of the dropped weights.

    The row sums put a value projection after the attention: with values M W + 1 b, the result is out W + row_sum b for
    v = M, exactly, also with dropout. SAM 2 attends to 64-wide memories with 256-wide keys (arXiv 2408.00714, section
    4 and appendix C).

    Args:
        q: queries [N, L, D]; k: keys [N, M, D]; v: values [N, M, Dv]. D is even; float32, bfloat16 or float16 (float64
            runs on the reference), all of one dtype; expanded (stride 0) tensors are fine.
        rotary: cosines and sines [hw, D / 2], float32, of axial rotary embedding (RoPE-ViT, arXiv 2403.13298): row i of
            q and of k turns its neighboring channels by row i modulo hw. None does not rotate.
        num_unrotated: keys at the end that are not rotated (object pointers).
        dropout: probability that a weight is dropped; the others are divided by 1 - dropout.
        seed: int64 scalar on the device of q, which determines what is dropped, the same in every back end; None draws
            one from torch's global generator.
        key_projection: weight [D, E] and bias [D] in the dtype of q; k is then [N, M, E] before this linear map. The
            projected keys are not kept for the backward pass but computed again.
        backend: `auto` takes `cpp` for CPU and `triton` for CUDA tensors where they are installed.

    Returns:
        out [N, L, Dv] in the dtype of v, and row sums [N, L] (1 without dropout) in float32, or float64 for float64.

    Raises:
        ValueError: a shape, dtype or option that cannot be.
    """
    if key_projection is not None and torch.compiler.is_compiling():  # the compiler decides itself what to keep
        k, key_projection = F.linear(k, *key_projection), None
    _check(q, k, v, rotary, num_unrotated, key_projection)
    threshold(dropout)
    if rotary is None:
        rotary = (q.new_empty(0, q.shape[-1] // 2, dtype=torch.float32),) * 2
    if seed is None:
        # Without dropout nothing reads it, and the generator stays as it was.
        seed = draw_seed(q.device) if dropout else torch.zeros((), dtype=torch.int64, device=q.device)
    run = attention.choose(backend, q)
    options = *rotary, num_unrotated, float(dropout), seed
    if key_projection is not None:
        return _WithProjection.apply(run, q, k, *key_projection, v, *options)
    out, row_sum, _ = run(q, k, v, *options)
    return out, row_sum


class _WithProjection(torch.autograd.Function):
    """Attention to keys that are projected here, and once more in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, q: Tensor, k: Tensor, weight: Tensor, bias: Tensor, v: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        cos, sin, *ctx.settings, seed = options
        ctx.run = attention_backward.overloads[run._overloadname]
        outputs = run(q, F.linear(k, weight, bias), v, *options)
        ctx.save_for_backward(*outputs, q, k, weight, bias, v, cos, sin, seed)
        return outputs[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *outputs, q, k, weight, bias, v, cos, sin, seed = ctx.saved_tensors
        projected = F.linear(k, weight, bias)
        grad_q, grad_projected, grad_v = ctx.run(*grads, *outputs, q, projected, v, cos, sin, *ctx.settings, seed)
        rows, needed = grad_projected.flatten(0, 1), ctx.needs_input_grad
        grad_k = grad_projected @ weight if needed[2] else None
        grad_weight = rows.t() @ k.flatten(0, 1) if needed[3] else None
        grad_bias = rows.sum(dim=0) if needed[4] else None
        return None, grad_q, grad_k, grad_weight, grad_bias, grad_v, None, None, None, None, None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    num_unrotated: int,
    key_projection: tuple[Tensor, Tensor] | None,
) -> None:
    if not (q.dim() == k.dim() == v.dim() == 3 and q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (q, k, v))
        raise ValueError(f"q, k and v must be floating point [N, L, D], [N, M, D] and [N, M, Dv], not {shapes}")
    width = q.shape[2] if key_projection is None else k.shape[2]
    if not (len(q) == len(k) == len(v) and width == k.shape[2] and k.shape[1] == v.shape[1] >= 1):
        raise ValueError(
            "q [N, L, D], k [N, M, D] and v [N, M, Dv] must agree in N, D and M >= 1, not "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if not 0 <= num_unrotated <= k.shape[1]:
        raise ValueError(f"num_unrotated must be between 0 and the {k.shape[1]} keys, not {num_unrotated}")
    if q.shape[2] % 2 or q.shape[2] == 0:
        raise ValueError(f"queries and keys must have an even, positive width, not {q.shape[2]}")
    for part, shape in zip(key_projection or (), ((q.shape[2], k.shape[2]), (q.shape[2],)), strict=False):
        if part.shape != shape or part.dtype != q.dtype:
            raise ValueError(
                f"key_projection must be {q.dtype} weight {[q.shape[2], k.shape[2]]} and bias [{q.shape[2]}], not "
                + " and ".join(f"{part.dtype} {list(part.shape)}" for part in key_projection)
            )
    if rotary is None:
        return
    for table in rotary:
        if table.dim() != 2 or table.shape[1] != q.shape[2] // 2 or not len(table) or table.dtype != torch.float32:
            raise ValueError(
                f"rotary must be two float32 tables [hw, {q.shape[2] // 2}], not {table.dtype} {list(table.shape)}"
            )
    if rotary[0].shape != rotary[1].shape:
        raise ValueError(f"the rotary tables differ: {list(rotary[0].shape)} and {list(rotary[1].shape)}")


def _fake(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    computed = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.new_empty(q.shape[:2], dtype=computed)
    return v.new_empty((*q.shape[:2], v.shape[2])), rows, torch.empty_like(rows)


def _fake_backward(_, __, ___, ____, _____, q: Tensor, k: Tensor, v: Tensor, *______) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.num_unrotated, ctx.dropout, seed = inputs
    ctx.save_for_backward(*output, *tensors, seed)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, run, grad_out: Tensor, grad_row_sum: Tensor, _) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    grads = run(grad_out, grad_row_sum, *tensors, ctx.num_unrotated, ctx.dropout, seed)
    return *grads, None, None, None, None, None


def _flops(q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, *_, **__) -> int:
    return 2 * q_shape[0] * q_shape[1] * k_shape[1] * (q_shape[2] + v_shape[2])


def _flops_backward(_, __, ___, ____, _____, q_shape, k_shape, v_shape, *______, **_______) -> int:
    """The scores once more, their gradient by the values, and the gradients of q, k and v."""
    return 2 * q_shape[0] * q_shape[1] * k_shape[1] * (3 * q_shape[2] + 2 * v_shape[2])


_OPTIONS = "Tensor cos, Tensor sin, SymInt num_unrotated, float dropout, Tensor seed"

attention = library.Operator(
    "memory_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor row_sum, Tensor lse)",
    reference=reference.memory_attention,
    fake=_fake,
    triton=library.lazy(__package__, "triton:memory_attention"),
    cpp=(cpu.memory_attention, cpu.COMPILED_STEP),
    kernel_dtypes=library.KERNEL_DTYPES,
    flops=_flops,
    slower="slower and with all scores in memory",
)
attention_backward = library.Operator(
    "memory_attention_backward",
    "(Tensor grad_out, Tensor grad_row_sum, Tensor out, Tensor row_sum, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"{_OPTIONS}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    reference=reference.memory_attention_backward,
    fake=_fake_backward,
    triton=library.lazy(__package__, "triton:memory_attention_backward"),
    cpp=(cpu.memory_attention_backward, cpu.COMPILED_STEP),
    flops=_flops_backward,
)
attention.differentiate(attention_backward, _backward, _setup_context)
