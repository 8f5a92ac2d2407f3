"""The chosen mask at full resolution as the memory encoder wants it: 20 sigmoid(upsampled logits) - 10."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness.case import (
    FACTOR,
    Case,
    Outputs,
    Provider,
    Run,
    Shape,
    compiled,
    cpp_obstacle,
    triton_obstacle,
)
from harness.inputs import discs
from torch import Tensor

from sam2fast_kernels import library
from sam2fast_kernels.upsample import upsample

SCALE, BIAS = 20.0, -10.0


class Inputs(NamedTuple):
    logits: Tensor
    """[N, M, h, w], a leaf that wants a gradient."""
    slopes: Tensor
    """Gradient of the result, [N, M, H, W]."""


def eager(logits: Tensor) -> Tensor:
    size = [FACTOR * side for side in logits.shape[-2:]]
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid() * SCALE + BIAS


def _provider(make: Callable[[], Callable[[Tensor], Tensor]], *details) -> Provider:
    def prepare() -> Run:
        function = make()
        return lambda inputs: {"mask": function(inputs.logits)}

    return Provider(prepare, *details)


class UpsampleCase(Case):
    name = "upsample"
    about = "bilinear upsampling, sigmoid, scale and bias in one pass, 256 -> 1024"
    modes = ("fwd", "bwd", "full")
    shapes = ("3x1", "8x1", "64x1")
    check_shape = "3x2@17"

    def __init__(self) -> None:
        options = {"activation": "sigmoid", "scale": SCALE, "bias": BIAS}
        cpp, triton = (functools.partial(upsample, factor=FACTOR, backend=b, **options) for b in ("cpp", "triton"))
        self.providers = {
            "eager": _provider(lambda: eager, 5),
            "compiled": _provider(lambda: compiled(eager), 3, library.compile_obstacle),
            "cpp": _provider(lambda: cpp, 2, cpp_obstacle),
            "triton": _provider(lambda: triton, 2, triton_obstacle),
        }

    def make_inputs(self, shape: Shape, device: torch.device) -> Inputs:
        logits, targets = discs(shape, device)
        slopes = torch.rand((*logits.shape[:2], *targets.shape[1:]), generator=torch.Generator().manual_seed(1))
        return Inputs(logits.requires_grad_(), slopes.to(device))

    def backward(self, inputs: Inputs, outputs: Outputs) -> Tensor:
        (gradient,) = torch.autograd.grad(outputs["mask"], inputs.logits, inputs.slopes)
        return gradient

    def reference(self, inputs: Inputs) -> Outputs:
        logits = inputs.logits.detach().double().requires_grad_()
        return self.observe(lambda same: {"mask": eager(same.logits)}, Inputs(logits, inputs.slopes.double()))

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Logits read and the mask written once; its gradient read and that of the logits written once."""
        forward = backward = inputs.logits.nbytes + inputs.slopes.nbytes
        backward += inputs.logits.nbytes  # sigmoid' needs the logits again
        return {"fwd": forward, "bwd": backward, "full": forward + inputs.slopes.nbytes + inputs.logits.nbytes}[mode]


CASE = UpsampleCase()
