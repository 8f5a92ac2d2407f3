"""`warp_image` and `warp_masks`: one bilinear resampling of a frame, its colors changed on the way, and of its masks.

They run through the operators `sam2fast::warp_image` and `sam2fast::warp_masks`. Derivation, numerics and cost:
README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library
from . import reference

MASKS_AT_ONCE = 8
"""Masks of one call of the operator: one bit each of a byte."""
LONGEST_SIDE = 2**23 - 1
"""Of an image or its codes, in pixels: `cpp` has coordinates as int32 in 1/256 of one."""


def warp_image(
    out: Tensor, image: Tensor, matrix: Tensor, color: Tensor, fill: Tensor, backend: library.Backend = "auto"
) -> None:
    """Write into `out` the image as seen through an affine map, its colors through another one.

    Args:
        out: uint8 [3, S, S'], contiguous.
        image: uint8 [H, W, 3], any stride of its rows.
        matrix: float64 [2, 3]: output pixel (x, y) to coordinates in pixels of the image, (0, 0) the center of its
            first one. Coordinates up to half a pixel outside of the pixel centers belong to the image.
        color: float32 [3, 4]: channels (R, G, B, 1) to what is written, rounded and clipped to 0 ... 255.
        fill: uint8 [3], what is written outside of the image.
        backend: `auto` takes `cpp` where it is built.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    _check("out", out, torch.uint8, (3, None, None))
    _check("image", image, torch.uint8, (None, None, 3))
    _check("matrix", matrix, torch.float64, (2, 3))
    _check("color", color, torch.float32, (3, 4))
    _check("fill", fill, torch.uint8, (3,))
    image_warp.choose(backend, image)(out, image, matrix, color, fill)


def warp_masks(out: Tensor, codes: Tensor, matrix: Tensor, backend: library.Backend = "auto") -> None:
    """Write into `out` masks as seen through an affine map: where bilinear interpolation of 0 and 1 reaches 1/2.

    Args:
        out: bool [N, S, S'], contiguous, N at most `MASKS_AT_ONCE`.
        codes: uint8 [H, W], any stride of its rows; bit n is mask n. Higher bits are not read.
        matrix: as in `warp_image`; outside of the image there is no mask.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    _check("out", out, torch.bool, (None, None, None))
    _check("codes", codes, torch.uint8, (None, None))
    _check("matrix", matrix, torch.float64, (2, 3))
    if len(out) > MASKS_AT_ONCE:
        raise ValueError(f"at most {MASKS_AT_ONCE} masks fit into the bits of a code, not {len(out)}: call again")
    mask_warp.choose(backend, codes)(out, codes, matrix)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(
        want in (None, is_) for want, is_ in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        wanted = ", ".join("*" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must be {dtype} [{wanted}], not {tensor.dtype} {list(tensor.shape)}")
    if name not in ("image", "codes"):
        return
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, it is {list(tensor.shape)}")
    if max(tensor.shape) > LONGEST_SIDE:
        raise ValueError(f"{name} may have at most {LONGEST_SIDE} pixels a side, it is {list(tensor.shape)}")


def _fake(*_) -> None:
    pass


image_warp = library.Operator(
    "warp_image",
    "(Tensor(a!) out, Tensor image, Tensor matrix, Tensor color, Tensor fill) -> ()",
    reference=reference.warp_image,
    fake=_fake,
    slower="a hundred times slower",
)
mask_warp = library.Operator(
    "warp_masks",
    "(Tensor(a!) out, Tensor codes, Tensor matrix) -> ()",
    reference=reference.warp_masks,
    fake=_fake,
    slower="a hundred times slower",
)
