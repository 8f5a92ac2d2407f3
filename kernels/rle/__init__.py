"""COCO run-length masks (the format of SA-V, SA-1B and COCO annotations)."""

from .op import RleError, RunLengths, decode, parse

__all__ = ["RleError", "RunLengths", "decode", "parse"]
