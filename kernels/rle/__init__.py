"""COCO run-length masks (the format of SA-V, SA-1B and COCO annotations)."""

from .op import RleError, decode

__all__ = ["RleError", "decode"]
