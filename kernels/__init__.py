"""sam2fast_kernels: operators of SAM 2 training as a library of their own; needs torch only.

Every operator has a folder with its derivation (README.md), its ground truth in plain PyTorch (reference.py) and its
public functions (op.py). Compiled and Triton back ends are optional; see `sam2fast_kernels.library`.
"""

from . import mask_loss, rle
from .masks import pack_masks, unpack_masks

__all__ = ["mask_loss", "pack_masks", "rle", "unpack_masks"]
