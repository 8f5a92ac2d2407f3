"""`mask_loss`: focal, dice and IoU losses of low-resolution logits against full-resolution masks, in one pass.

Two operators carry it: `sam2fast::mask_sums` reduces every mask to three sums and three counts, and
`sam2fast::mask_sums_backward` turns gradients of the sums into gradients of the logits. What is left is arithmetic on
[N, M] numbers, plain PyTorch here. Derivation, numerics and cost: README.md.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import library
from ..masks import upsampling_factor
from . import reference


class MaskLosses(NamedTuple):
    """Per object and candidate mask, all [N, M] but `present`. Gradients: focal, dice to logits; iou_loss to IoUs."""

    focal: Tensor
    """Sigmoid focal loss, mean over pixels."""
    dice: Tensor
    """1 - (2 sum(p g) + 1) / (sum(p) + sum(g) + 1)."""
    iou_loss: Tensor | None
    """|predicted - true IoU| or its square; None without predicted IoUs."""
    iou: Tensor
    """True IoU of the mask (logits above 0), 0 where mask and target are both empty."""
    intersection: Tensor
    """Pixels, int64."""
    union: Tensor
    """Pixels, int64."""
    present: Tensor
    """Whether the target has any pixel, bool [N]."""


def mask_loss(
    logits: Tensor,
    targets: Tensor,
    pred_ious: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    iou_loss: Literal["l1", "mse"] = "l1",
    packed: bool = False,
    backend: library.Backend = "auto",
) -> MaskLosses:
    """Losses of N objects with M candidate masks each, as if the logits were first upsampled to the targets.

    Nothing at the resolution of the targets is ever stored. Bilinear upsampling, align_corners=False, as the official
    SAM 2 trainer does; focal as arXiv 1708.02002 eq. 5, dice as arXiv 1606.04797 with 1 added above and below.

    Args:
        logits: [N, M, h, w], float32, bfloat16 or float16 (float64 runs on the reference), any strides. All arithmetic
            is in float32.
        targets: [N, H, W], bool or uint8 (not 0 is foreground), H = s h and W = s w with a whole number s, any strides;
            with `packed`, uint8 [N, H, ceil(W / 8)] of `pack_masks`.
        pred_ious: predicted IoU [N, M].
        gamma: focusing exponent, at least 0.
        alpha: weight of the foreground in 0..1, the background has 1 - alpha; None weighs both 1.
        backend: `auto` takes `cpp` for CPU and `triton` for CUDA tensors where they are installed.

    Returns:
        See `MaskLosses`; in float32 (float64 for float64 logits). Gradients of logits and predicted IoUs only.

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
    """
    if logits.dim() != 4:
        raise ValueError(f"logits must be [N, M, h, w], not {list(logits.shape)}")
    factor = upsampling_factor(logits, targets, packed)
    _check_options(logits, pred_ious, gamma, alpha, iou_loss)
    run = mask_sums.choose(backend, logits)
    sums, counts = run(logits, targets, packed, float(gamma), -1.0 if alpha is None else float(alpha))

    focal_sum, p, p_inside = sums.unbind(-1)
    intersection, predicted, target = counts.unbind(-1)
    pixels = factor * factor * logits.shape[-2] * logits.shape[-1]
    union = predicted + target - intersection
    iou = intersection.to(sums.dtype) / union.clamp(min=1)
    error = None if pred_ious is None else pred_ious.to(sums.dtype) - iou
    return MaskLosses(
        focal=focal_sum / pixels,
        dice=1 - (2 * p_inside + 1) / (p + target + 1),
        iou_loss=None if error is None else error.abs() if iou_loss == "l1" else error.square(),
        iou=iou,
        intersection=intersection,
        union=union,
        present=(target > 0).any(-1),
    )


class MaskLoss(nn.Module):
    """`mask_loss` with its options bound."""

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = 0.25,
        iou_loss: Literal["l1", "mse"] = "l1",
        packed: bool = False,
        backend: library.Backend = "auto",
    ) -> None:
        super().__init__()
        self.options = {"gamma": gamma, "alpha": alpha, "iou_loss": iou_loss, "packed": packed, "backend": backend}

    def forward(self, logits: Tensor, targets: Tensor, pred_ious: Tensor | None = None) -> MaskLosses:
        return mask_loss(logits, targets, pred_ious, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_options(logits: Tensor, pred_ious: Tensor | None, gamma: float, alpha: float | None, iou_loss: str) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be a finite number of at least 0, not {gamma!r}")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0..1, or be None for no class balance, not {alpha!r}")
    if iou_loss not in ("l1", "mse"):
        raise ValueError(f"iou_loss must be 'l1' or 'mse', not {iou_loss!r}")
    if pred_ious is not None and pred_ious.shape != logits.shape[:2]:
        raise ValueError(
            f"pred_ious must be [N, M] = {list(logits.shape[:2])}, as the logits, not {list(pred_ious.shape)}"
        )


def _fake(logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:2], 3)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


def _fake_backward(grad_sums: Tensor, logits: Tensor, *_) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets)


def _backward(ctx, run, grad_sums: Tensor, _grad_counts) -> tuple[Tensor | None, ...]:
    logits, targets = ctx.saved_tensors
    return run(grad_sums, logits, targets, *ctx.options), None, None, None, None


def _pixels(logits_shape: torch.Size, targets_shape: torch.Size) -> int:
    """Pixels of all candidates at full resolution."""
    n, m, height, width = logits_shape
    return n * m * height * width * (targets_shape[1] // height) ** 2


def _flops(logits_shape: torch.Size, targets_shape: torch.Size, *_, **__) -> int:
    return FORWARD_FLOPS * _pixels(logits_shape, targets_shape)


def _flops_backward(_, logits_shape: torch.Size, targets_shape: torch.Size, *__, **___) -> int:
    return BACKWARD_FLOPS * _pixels(logits_shape, targets_shape)


FORWARD_FLOPS, BACKWARD_FLOPS = 48, 54
"""Floating-point operations per pixel and candidate, counted in README.md."""

mask_sums = library.Operator(
    "mask_sums",
    "(Tensor logits, Tensor targets, bool packed, float gamma, float alpha) -> (Tensor sums, Tensor counts)",
    reference=reference.mask_sums,
    fake=_fake,
    triton=library.lazy(__package__, "triton:mask_sums"),
    kernel_dtypes=library.KERNEL_DTYPES,
    flops=_flops,
    slower="over ten times slower and with full-resolution copies",
)
mask_sums_backward = library.Operator(
    "mask_sums_backward",
    "(Tensor grad_sums, Tensor logits, Tensor targets, bool packed, float gamma, float alpha) -> Tensor",
    reference=reference.mask_sums_backward,
    fake=_fake_backward,
    triton=library.lazy(__package__, "triton:mask_sums_backward"),
    flops=_flops_backward,
)
mask_sums.differentiate(mask_sums_backward, _backward, _setup_context)
