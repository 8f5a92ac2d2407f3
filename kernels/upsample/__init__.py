"""Mask logits at full resolution, or what the memory encoder wants of them, in one pass; see README.md."""

from .op import upsample

__all__ = ["upsample"]
