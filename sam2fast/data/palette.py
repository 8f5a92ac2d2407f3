"""The colour table of DAVIS and PASCAL VOC palette images."""

from __future__ import annotations

import numpy as np


def davis_palette() -> np.ndarray:
    """Colours of labels 0..255 as uint8 [256, 3] RGB: black, then strongly different neighbours.

    The bits of a label are dealt to red, green and blue in turn, from the highest bit of each channel down
    (the label colour map of PASCAL VOC, which DAVIS annotations use).
    """
    labels = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((labels >> channel) & 1) << (7 - bit)).astype(np.uint8)
        labels = labels >> 3
    return palette
