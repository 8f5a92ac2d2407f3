"""Focal, dice and IoU of every candidate mask, from logits at a quarter of the resolution of the masks.

The baseline is what official SAM 2 training computes: all candidates upsampled in float32, then each loss elementwise
on its own. Gradients reach focal and dice of all candidates, through one random weight each.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness.case import Case, Outputs, Provider, Run, Shape, compiled, cpp_obstacle, triton_obstacle
from harness.inputs import discs
from torch import Tensor

from sam2fast_kernels import library
from sam2fast_kernels.mask_loss import mask_loss

GAMMA, ALPHA = 2.0, 0.25


class Inputs(NamedTuple):
    logits: Tensor
    """[N, M, h, w], a leaf that wants a gradient."""
    targets: Tensor
    """bool [N, H, W]"""
    weights: Tensor
    """Of focal and dice: [2, N, M]."""


def eager(logits: Tensor, targets: Tensor, weights: Tensor) -> Outputs:
    """The official formula, with the mask as a float tensor that is expanded to all candidates."""
    full = F.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
    truth = targets[:, None].float().expand_as(full)
    focal, dice = _focal(full, truth), _dice(full, truth)
    loss = (weights[0] * focal + weights[1] * dice).sum()
    return {"loss": loss, "focal": focal, "dice": dice, "iou": _iou(full, truth)}


def _focal(logits: Tensor, truth: Tensor) -> Tensor:
    p = logits.sigmoid()
    p_of_truth = p * truth + (1 - p) * (1 - truth)
    balance = ALPHA * truth + (1 - ALPHA) * (1 - truth)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (balance * (1 - p_of_truth) ** GAMMA * cross_entropy).mean((-2, -1))


def _dice(logits: Tensor, truth: Tensor) -> Tensor:
    p = logits.sigmoid()
    overlap, areas = (p * truth).sum((-2, -1)), p.sum((-2, -1)) + truth.sum((-2, -1))
    return 1 - (2 * overlap + 1) / (areas + 1)


def _iou(logits: Tensor, truth: Tensor) -> Tensor:
    mask, target = logits > 0, truth > 0
    intersection, union = (mask & target).sum((-2, -1)).float(), (mask | target).sum((-2, -1)).float()
    return intersection / union.clamp(min=1)


def fused(logits: Tensor, targets: Tensor, weights: Tensor, backend: library.Backend) -> Outputs:
    losses = mask_loss(logits, targets, gamma=GAMMA, alpha=ALPHA, backend=backend)
    loss = (weights[0] * losses.focal + weights[1] * losses.dice).sum()
    return {"loss": loss, "focal": losses.focal, "dice": losses.dice, "iou": losses.iou}


def _unpacked(function: Any) -> Run:
    return lambda inputs: function(*inputs)


class MaskLossCase(Case):
    name = "mask_loss"
    about = "upsampling, focal, dice and IoU of all candidates, 256 -> 1024"
    modes = ("fwd", "bwd", "full")
    shapes = ("3x3", "8x3", "64x3", "64x1")
    check_shape = "3x2@17"

    def __init__(self) -> None:
        self.providers = {
            "eager": Provider(lambda: _unpacked(eager), full_size_tensors=12),
            "compiled": Provider(lambda: _unpacked(compiled(eager)), 4, library.compile_obstacle),
            "cpp": Provider(lambda: _unpacked(functools.partial(fused, backend="cpp")), 0, cpp_obstacle),
            "triton": Provider(lambda: _unpacked(functools.partial(fused, backend="triton")), 0, triton_obstacle),
        }

    def make_inputs(self, shape: Shape, device: torch.device) -> Inputs:
        logits, targets = discs(shape, device)
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand(2, shape.objects, shape.candidates, generator=generator).to(device)
        return Inputs(logits.requires_grad_(), targets, weights)

    def backward(self, inputs: Inputs, outputs: Outputs) -> Tensor:
        (gradient,) = torch.autograd.grad(outputs["loss"], inputs.logits)
        return gradient

    def reference(self, inputs: Inputs) -> Outputs:
        # Objects are independent, so they are computed one at a time, which bounds memory.
        parts = []
        for n in range(len(inputs.logits)):
            logits = inputs.logits[n : n + 1].detach().double().requires_grad_()
            one = Inputs(logits, inputs.targets[n : n + 1], inputs.weights[:, n : n + 1].double())
            parts.append(self.observe(_unpacked(functools.partial(fused, backend="reference")), one))
        expected = {name: torch.cat([part[name] for part in parts]) for name in ("focal", "dice", "iou", "gradient")}
        return expected | {"loss": torch.stack([part["loss"] for part in parts]).sum()}

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Logits and targets read once, and the gradient of the logits written once."""
        return inputs.logits.nbytes * (1 if mode == "fwd" else 2) + inputs.targets.nbytes


CASE = MaskLossCase()
