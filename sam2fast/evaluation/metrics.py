"""Region similarity J and boundary accuracy F of masks, as the DAVIS benchmark defines them.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR 2016, section 5;
Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation", section 2. Both scores are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

BOUND_TH = 0.008
"""Distance, as a share of the image diagonal, within which two boundaries match."""


def region_similarity(prediction: np.ndarray, target: np.ndarray) -> float:
    """J: intersection over union of two bool masks [H, W]; 1 where both are empty."""
    _check_pair(prediction, target)
    union = np.count_nonzero(prediction | target)
    return np.count_nonzero(prediction & target) / union if union else 1.0


def boundary_accuracy(prediction: np.ndarray, target: np.ndarray, bound_th: float = BOUND_TH) -> float:
    """F: harmonic mean of the precision and recall of the boundary of two bool masks [H, W]; 1 where both are empty.

    A boundary pixel is right where the other boundary, dilated by a disk of radius ceil(bound_th * diagonal) pixels,
    covers it: the DAVIS approximation of a bipartite matching of the two contours (Martin et al., PAMI 2004).
    """
    _check_pair(prediction, target)
    rows, columns = _extent(prediction | target)
    ours = boundary_map(prediction)[rows, columns]
    theirs = boundary_map(target)[rows, columns]
    num_ours, num_theirs = np.count_nonzero(ours), np.count_nonzero(theirs)
    if num_ours == 0 or num_theirs == 0:
        return float(num_ours == num_theirs)
    disk = _disk(int(np.ceil(bound_th * np.hypot(*prediction.shape))))
    precision = np.count_nonzero(ours & _dilate(theirs, disk)) / num_ours
    recall = np.count_nonzero(theirs & _dilate(ours, disk)) / num_theirs
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """One pixel wide boundary of a bool mask [H, W], bool [H, W].

    A pixel belongs to it where its value differs from that of its right, lower or lower right neighbor; the image
    border itself is no boundary.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def scored_frames(annotated: Sequence[int], first: int) -> list[int]:
    """The frames on which an object counts: annotated ones from its `first` on, without the video's first and last.

    The rule of DAVIS, extended to objects that appear later as the official SA-V evaluation does: frames before an
    object's appearance ask nothing of a method, and its first mask counts unless it lies on the video's first frame.
    """
    return [frame for frame in sorted(annotated)[1:-1] if frame >= first]


def _check_pair(prediction: np.ndarray, target: np.ndarray) -> None:
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(
            f"masks must be two [H, W] arrays of one size, got {prediction.shape} and {target.shape};"
            " resize the prediction to the ground truth first"
        )
    if prediction.dtype != bool or target.dtype != bool:
        raise ValueError(f"masks must be bool, got {prediction.dtype} and {target.dtype}; apply a threshold first")


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns that hold the mask and, one pixel up and left of it, its boundary."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return slice(0), slice(0)
    return slice(max(rows[0] - 1, 0), rows[-1] + 1), slice(max(columns[0] - 1, 0), columns[-1] + 1)


def _disk(radius: int) -> np.ndarray:
    offset = np.arange(-radius, radius + 1)
    return (offset[:, None] ** 2 + offset**2 <= radius**2).astype(np.uint8)


def _dilate(mask: np.ndarray, disk: np.ndarray) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), disk).astype(bool)
