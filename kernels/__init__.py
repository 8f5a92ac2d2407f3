"""sam2fast_kernels: operators of SAM 2 training as a library of their own; needs torch only.

Every operator has a folder with its derivation (README.md), its ground truth in plain PyTorch (reference.py) and its
public function (op.py). The compiled back end is optional; see `sam2fast_kernels.library`.
"""

from . import rle

__all__ = ["rle"]
