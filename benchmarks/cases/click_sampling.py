"""The next click on each object: a pixel drawn uniformly from all that the prediction gets wrong.

The baseline is the official way: the logits upsampled, two error maps, uniform noise over both, and its argmax.
`reference` draws one number for each object and looks up the pixel of that rank. Logits are multiples of 1/16, so that
bilinear upsampling is exact in float32, whatever the order of its operations: providers that draw the same number must
find the same pixel.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness.case import Case, Outputs, Provider, Run, Shape, cpp_obstacle, triton_obstacle
from harness.inputs import discs
from torch import Tensor

from sam2fast_kernels import library
from sam2fast_kernels.click_sampling import uniform_click


class Inputs(NamedTuple):
    logits: Tensor
    """[N, 1, h, w]"""
    targets: Tensor
    """bool [N, H, W]"""
    generator: torch.Generator


def eager(inputs: Inputs) -> Outputs:
    false, missed = _regions(inputs.logits, inputs.targets)
    noise = torch.rand(len(false), 2, *false.shape[1:], generator=inputs.generator, device=false.device)
    index = (noise * torch.stack([false, missed], dim=1)).flatten(1).argmax(1)
    height, width = false.shape[1:]
    pixel = index % (height * width)
    return {"coords": torch.stack([pixel % width, pixel // width], dim=1), "labels": index // (height * width)}


def _regions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where a click may be negative and where positive, bool [N, H, W] both."""
    predicted = F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)[:, 0] > 0
    perfect = (predicted == targets).flatten(1).all(1)[:, None, None]
    return (predicted | perfect) & ~targets, targets & ~predicted


def fused(inputs: Inputs, backend: library.Backend) -> Outputs:
    coords, labels = uniform_click(inputs.targets, inputs.logits, generator=inputs.generator, backend=backend)
    return {"coords": coords[:, 0], "labels": labels[:, 0]}


class ClickSamplingCase(Case):
    name = "click_sampling"
    about = "uniform choice of a wrong pixel for each object, 256 -> 1024"
    modes = ("fwd",)
    shapes = ("3", "8", "64")
    check_shape = "3@17"
    has_candidates = False

    def __init__(self) -> None:
        self.providers = {"eager": Provider(lambda: eager, full_size_tensors=6)}
        for backend, size, obstacle in (
            ("reference", 3, lambda device: None),
            ("cpp", 0, cpp_obstacle),
            ("triton", 0, triton_obstacle),
        ):
            run = functools.partial(fused, backend=backend)
            self.providers[backend] = Provider(lambda run=run: run, size, obstacle)

    def make_inputs(self, shape: Shape, device: torch.device) -> Inputs:
        logits, targets = discs(shape, torch.device("cpu"))
        logits = (16 * logits).round() / 16
        if shape.objects > 1:  # one perfect prediction
            targets[1] = ~_regions(logits[1:2], torch.ones_like(targets[1:2]))[1][0]
        return Inputs(logits.to(device), targets.to(device), torch.Generator(device))

    def observe(self, run: Run, inputs: Inputs) -> Outputs:
        inputs.generator.manual_seed(0)
        return run(inputs)

    def reference(self, inputs: Inputs) -> Outputs:
        inputs = inputs._replace(logits=inputs.logits.double())
        false, missed = _regions(inputs.logits, inputs.targets)
        chosen = self.observe(functools.partial(fused, backend="reference"), inputs)
        return chosen | {"regions": torch.stack([false, missed], dim=1)}

    def fault(self, provider: str, observed: Outputs, expected: Outputs) -> str | None:
        objects = torch.arange(len(observed["labels"]), device=observed["labels"].device)
        (x, y), label = observed["coords"].long().unbind(1), observed["labels"].long()
        regions = expected["regions"]
        allowed = regions[objects, label, y, x] | ~regions.flatten(1).any(1)
        if not allowed.all():
            return f"{(~allowed).sum().item()} clicks lie outside the wrong pixels of their label"
        drawn_alike = provider != self.baseline
        if drawn_alike and not torch.equal(observed["coords"].long(), expected["coords"].long()):
            return "the same random numbers give other pixels than those of the reference"
        return None

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Logits and targets read once."""
        return inputs.logits.nbytes + inputs.targets.nbytes


CASE = ClickSamplingCase()
