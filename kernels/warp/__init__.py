"""Frames and masks of a training sample resampled to the input of the model; see README.md."""

from .op import warp_image, warp_masks

__all__ = ["warp_image", "warp_masks"]
