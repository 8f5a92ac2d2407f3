"""sam2fast_kernels: operators of SAM 2 training as a library of their own; needs torch only.

Every operator has a folder with its derivation (README.md), its ground truth in plain PyTorch (reference.py) and its
public functions (op.py). Compiled and Triton back ends are optional; see `sam2fast_kernels.library`.
"""

if __name__ == "kernels":
    # A checkout on sys.path, where transformers and others look for the package `kernels`.
    raise ImportError("this folder is the source of sam2fast_kernels, not the package `kernels`: take it off sys.path")

from . import click_sampling, layer_norm, mask_loss, rle, upsample, warp
from .masks import pack_masks, unpack_masks

__all__ = ["click_sampling", "layer_norm", "mask_loss", "pack_masks", "rle", "unpack_masks", "upsample", "warp"]
