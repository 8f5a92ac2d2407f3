"""Fused focal, dice and IoU loss of low-resolution mask logits; README.md has derivation, numerics and cost."""

from .op import MaskLoss, MaskLosses, mask_loss
from .points import sampled_mask_loss

__all__ = ["MaskLoss", "MaskLosses", "mask_loss", "sampled_mask_loss"]
