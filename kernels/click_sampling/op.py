"""`uniform_click` and `center_click`: where a simulated user corrects a predicted mask next.

The operators `sam2fast::click_uniform` and `sam2fast::click_center` find one pixel for each object from low-resolution
logits and the full-resolution target. Derivation, numerics and cost: README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library
from ..masks import upsampling_factor
from . import reference


def uniform_click(
    targets: Tensor,
    logits: Tensor | None,
    *,
    packed: bool = False,
    generator: torch.Generator | None = None,
    backend: library.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """A pixel drawn uniformly from all wrong pixels of each object, positive if the prediction misses it.

    Where no pixel is wrong the click is negative, anywhere in the background; if there is none either, at (0, 0). These
    are the clicks of the official SAM 2 trainer.

    Args:
        targets: [N, H, W], bool or uint8 (not 0 is foreground), any strides; with `packed`, uint8
            [N, H, ceil(W / 8)] of `pack_masks`.
        logits: [N, h, w] or [N, 1, h, w] with H = s h and W = s w for a whole number s, any floating dtype and strides.
            Predicted is where they are above 0 after bilinear upsampling (align_corners=False). None: nothing is
            predicted, so that the click falls on the object.
        generator: source of the one float64 number that each object takes; None is torch's global one.
        backend: `auto` takes `cpp` for CPU and `triton` for CUDA tensors where they are installed.

    Returns:
        Coordinates (x, y) in pixels of the target, float32 [N, 1, 2], and labels int32 [N, 1], 1 positive, 0 negative.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    logits = _low_resolution(logits, targets, packed)
    # Double precision: float32 has 2^24 steps, too few to be even over the 2^20 pixels of a 1024 x 1024 mask.
    # torch.compile has no form of torch.rand with a generator of None and a size that varies.
    source = {} if generator is None else {"generator": generator}
    uniform = torch.rand(targets.shape[0], dtype=torch.float64, device=targets.device, **source)
    return _points(*click_uniform.choose(backend, logits)(logits, targets, packed, uniform))


def center_click(
    targets: Tensor, logits: Tensor | None, *, packed: bool = False, backend: library.Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The pixel deepest inside an error region, that of the false or that of the missed pixels, whichever is deeper.

    Depth is the Euclidean distance to the nearest pixel outside the region; the image ends outside. This is the click
    of the RITM benchmark (Sofiiuk et al. 2022, section 4) and of SAM's evaluation. Of equally deep pixels it is the
    first, row by row; without any error it is negative at (0, 0). Arguments and results are those of `uniform_click`.
    """
    logits = _low_resolution(logits, targets, packed)
    return _points(*click_center.choose(backend, logits)(logits, targets, packed))


def _low_resolution(logits: Tensor | None, targets: Tensor, packed: bool) -> Tensor:
    """Logits [N, h, w] that fit the targets."""
    if logits is None:
        if packed:
            raise ValueError(
                "packed targets do not tell the width of their masks: instead of None pass the logits of an empty "
                "prediction, torch.zeros(()).expand(N, H, W)"
            )
        # Targets with another number of dimensions are refused below.
        logits = torch.zeros((), device=targets.device).expand(targets.shape if targets.dim() == 3 else (1, 1, 1))
    if logits.dim() == 4 and logits.shape[1] != 1 or logits.dim() > 4:
        raise ValueError(
            f"logits must be [N, h, w] or [N, 1, h, w], one mask for each object, not {list(logits.shape)}"
        )
    upsampling_factor(logits, targets, packed)
    return logits.detach() if logits.dim() == 3 else logits.detach().squeeze(1)


def _points(coords: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    return coords[:, None].float(), positive[:, None].int()


def _fake(logits: Tensor, *_) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty((n, 2), dtype=torch.int64), logits.new_empty((n,), dtype=torch.bool)


def _flops(logits_shape: torch.Size, targets_shape: torch.Size, *_, **__) -> int:
    n, height, width = logits_shape
    return UPSAMPLING_FLOPS * n * height * width * (targets_shape[1] // height) ** 2


UPSAMPLING_FLOPS = 3
"""Floating-point operations of a pixel; everything else is in whole numbers."""

click_uniform = library.Operator(
    "click_uniform",
    "(Tensor logits, Tensor targets, bool packed, Tensor uniform) -> (Tensor coords, Tensor positive)",
    reference=reference.click_uniform,
    fake=_fake,
    triton=library.lazy(__package__, "triton:click_uniform"),
    kernel_dtypes=library.KERNEL_DTYPES,
    flops=_flops,
    slower="over ten times slower and with full-resolution copies",
)
click_center = library.Operator(
    "click_center",
    "(Tensor logits, Tensor targets, bool packed) -> (Tensor coords, Tensor positive)",
    reference=reference.click_center,
    fake=_fake,
    triton=library.lazy(__package__, "triton:click_center"),
    kernel_dtypes=library.KERNEL_DTYPES,
    flops=_flops,
    slower="hundreds of times slower and with full-resolution copies",
)
