"""What DALI needs to render plans: encoded frames, and the parameters of its graph as arrays. Made by loader workers,
which never import DALI.

The graph (`dali.py`) sees samples of F frames: each JPEG or PNG is one (F = 1), or each clip of a video (F = T). All
frames of a sample share the geometry; colors are per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from .augment import FILL, Geometry, color_mix
from .render import SamplePlan, render_masks
from .sample import PackedBatch, Sample, collate

Kind = Literal["image", "frames", "video"]
"""How frames reach the graph: encoded images, decoded clips [T, H, W, 3], or video files with frame numbers."""

Parameters = dict[str, np.ndarray]
"""Inputs of the graph by name; see `dali.build_pipeline`."""

_FRAME_INPUTS = ("color", "pivot", "base")
_MOSAIC_INPUTS = ("flip0", "flip1", "flip2", "flip3")
_SMOOTH_BELOW = 0.75
"""Shrinking to under this uses a Gaussian filter, else a triangular one: whichever is closer to area averaging."""
_TRIANGULAR, _GAUSSIAN = 1, 5
"""Values of nvidia.dali.types.DALIInterpType: INTERP_LINEAR (antialiased where it shrinks) and INTERP_GAUSSIAN."""
_BLANK = torch.from_numpy(cv2.imencode(".png", np.full((1, 1, 3), FILL[::-1], np.uint8))[1].ravel())
"""Stands in for a hidden frame, which need not be decoded."""


@dataclass
class EncodedSample:
    """A sample whose frames are still to be decoded."""

    plan: SamplePlan
    kind: Kind
    masks: torch.Tensor
    """As in `sample.Sample`."""
    data: list[torch.Tensor] | list[Path]
    """By sample of the graph. image: uint8 [bytes]; frames: uint8 [T, H, W, 3]; video: the file."""
    parameters: list[Parameters]


@dataclass
class EncodedBatch:
    """A batch whose frames are still to be decoded."""

    batch: PackedBatch
    """All but the frames, which are [B, T, 3, 0, 0]."""
    side: int
    """S of the square that the frames are brought to."""
    kind: Kind
    mosaic: bool
    """Whether a sample is one."""
    data: list[torch.Tensor] | list[Path]
    """As in `EncodedSample`, of all samples; but images are one tensor, since every tensor that a worker hands over
    takes a file descriptor."""
    image_bytes: list[int]
    """How many of them each image takes."""
    parameters: Parameters
    """The first axis over samples of the graph."""

    def arrays(self) -> list[np.ndarray]:
        """The data of each sample of the graph."""
        if self.kind == "image":
            return np.split(self.data[0].numpy(), np.cumsum(self.image_bytes)[:-1])
        if self.kind == "video":
            return [np.memmap(path, np.uint8, mode="r") for path in self.data]
        return [frames.numpy() for frames in self.data]

    def pin_memory(self) -> EncodedBatch:
        """The masks in page-locked memory; DALI brings the frames there itself."""
        return replace(self, batch=self.batch.pin_memory())


def encode(plan: SamplePlan, hardware_video: bool) -> EncodedSample:
    """Read the frames of a plan without decoding them, and draw its masks.

    Args:
        hardware_video: leave mp4 files to DALI where its frame numbers are ours (`VideoReader.plain`).

    Raises:
        DataError: a file is damaged.
    """
    masks = render_masks(plan)
    if hasattr(plan.record, "encoded"):
        return EncodedSample(plan, "image", masks, *_images(plan))
    video = getattr(plan.record, "plain_video", None) if hardware_video else None
    if video is None:
        return EncodedSample(plan, "frames", masks, *_decoded_clip(plan))
    return EncodedSample(plan, "video", masks, [video], [{**_clip_parameters(plan), "numbers": _clip_numbers(plan)}])


def assemble(samples: Sequence[EncodedSample]) -> EncodedBatch:
    """What `sample.collate` is for decoded ones. A batch is one run of one graph, so its samples become of one kind.

    Raises:
        DataError: a video that has to be decoded for that is damaged.
    """
    if len({sample.kind for sample in samples}) > 1:
        pairs = [_decoded_clip(sample.plan) for sample in samples]
        samples = [
            replace(sample, kind="frames", data=data, parameters=parameters)
            for sample, (data, parameters) in zip(samples, pairs, strict=True)
        ]
    mosaic = any(sample.plan.geometry.mosaic for sample in samples)
    parameters = [part for sample in samples for part in sample.parameters]
    names = [name for name in parameters[0] if mosaic or name not in _MOSAIC_INPUTS]
    kind, data = samples[0].kind, [item for sample in samples for item in sample.data]
    return EncodedBatch(
        batch=collate([_without_frames(sample) for sample in samples]).pack(),
        side=samples[0].plan.geometry.side,
        kind=kind,
        mosaic=mosaic,
        data=[torch.cat(data)] if kind == "image" else data,
        image_bytes=[len(item) for item in data] if kind == "image" else [],
        parameters={name: np.stack([part[name] for part in parameters]) for name in names},
    )


def _without_frames(sample: EncodedSample) -> Sample:
    plan = sample.plan
    frames = torch.empty(len(plan.frames), 3, 0, 0, dtype=torch.uint8)
    return Sample(frames, sample.masks, object_ids=list(plan.first), sample_id=plan.sample_id)


def _images(plan: SamplePlan) -> tuple[list[torch.Tensor], list[Parameters]]:
    """Every frame as a sample of the graph."""
    shown = [frame for frame, hidden in zip(plan.frames, plan.hidden, strict=True) if not hidden]
    encoded = iter(plan.record.encoded(shown))
    clip, one = _clip_parameters(plan), np.ones(2)
    blank = {**clip, **_geometry_inputs(np.zeros(2), one, one, np.eye(2, 3), plan.geometry.cell.side)}
    data, parameters = [], []
    for position, hidden in enumerate(plan.hidden):
        data.append(_BLANK if hidden else torch.frombuffer(bytearray(next(encoded)), dtype=torch.uint8))
        color = {name: clip[name][position : position + 1] for name in _FRAME_INPUTS}
        parameters.append({**(blank if hidden else clip), **color})
    return data, parameters


def _decoded_clip(plan: SamplePlan) -> tuple[list[torch.Tensor], list[Parameters]]:
    """All frames as one sample of the graph."""
    frames = np.stack(plan.record.frames(_clip_numbers(plan).tolist()))
    return [torch.from_numpy(frames)], [_clip_parameters(plan)]


def _clip_numbers(plan: SamplePlan) -> np.ndarray:
    """Hidden frames are repetitions of the first one, which costs no decoding."""
    numbers = [plan.frames[0] if hidden else frame for frame, hidden in zip(plan.frames, plan.hidden, strict=True)]
    return np.array(numbers, np.int32)


def _clip_parameters(plan: SamplePlan) -> Parameters:
    return {**_geometry(plan.geometry), **_colors(plan), **_blur(plan.sigma), **_mosaic(plan.geometry)}


def _geometry(geometry: Geometry) -> Parameters:
    """A resize of a rectangle of the image, and an affine map from the square, or a cell of the mosaic, to the result.

    In both, (0, 0) is the corner of the first pixel. Without rotation or shear the map moves whole pixels and mirrors,
    so that nothing is interpolated twice.
    """
    (rows, columns), side = geometry.source, geometry.cell.side
    source = np.array([rows.stop - rows.start, columns.stop - columns.start])
    if geometry.matrix is None:
        top, left = (part.start for part in geometry.target)
        size = np.array([part.stop - part.start for part in geometry.target])
        matrix = np.array([[1.0, 0, -left], [0, 1, -top]])
        if geometry.flip:
            matrix[0] = [-1, 0, side - left]
    else:
        # as `augment` does: an axis that shrinks much is brought to its final density before the warp
        linear = geometry.matrix[:, :2]
        density = np.linalg.norm(linear, axis=0)[::-1]
        size = np.where(density < _SMOOTH_BELOW, np.maximum(1, np.rint(source * density)), source)
        forward = np.vstack([np.column_stack([linear * (source / size)[::-1], geometry.matrix[:, 2]]), [0, 0, 1]])
        forward[:2, 2] += 0.5 - linear.sum(axis=1) / 2  # from pixel centers to corners
        matrix = np.linalg.inv(forward)[:2]
    return _geometry_inputs(np.array([rows.start, columns.start]), source, size, matrix, side)


def _geometry_inputs(
    start: np.ndarray, source: np.ndarray, size: np.ndarray, matrix: np.ndarray, side: int
) -> Parameters:
    shrink = _GAUSSIAN if (size / source).min() < _SMOOTH_BELOW else _TRIANGULAR
    return {
        "start": start.astype(np.int32),
        "shape": source.astype(np.int32),
        "size": size.astype(np.float32),
        "shrink": np.array(shrink, np.int32),
        "matrix": matrix.astype(np.float32),
        "square": np.array([side, side], np.float32),
    }


def _colors(plan: SamplePlan) -> Parameters:
    """For each frame: color [F, 3, 3] times the pixel, plus pivot [F, 1] times the mean gray of the frame, plus base
    [F, 3]. In hidden frames that is the fill color."""
    shown = ~np.array(plan.hidden)
    brightness, contrast, saturation = plan.colors.T
    mix = np.stack([color_mix(value) for value in saturation])
    color = (shown * brightness * contrast)[:, None, None] * mix
    pivot = (shown * brightness * (1 - contrast))[:, None]
    base = ~shown[:, None] * np.array(FILL)
    return {"color": color.astype(np.float32), "pivot": pivot.astype(np.float32), "base": base.astype(np.float32)}


def _blur(sigma: float) -> Parameters:
    """The window is that of OpenCV for 8-bit images; one of a single pixel changes nothing."""
    window = int(np.rint(6 * sigma + 1)) | 1 if sigma > 0 else 1
    return {"sigma": np.array(sigma or 1, np.float32), "window": np.array(window, np.int32)}


def _mosaic(geometry: Geometry) -> Parameters:
    """Which cells are mirrored. Without a mosaic the first is as large as the square, and the others are cut off."""
    flips = geometry.mosaic.flips if geometry.mosaic else (False,) * 4
    return {name: np.array(flip, np.int32) for name, flip in zip(_MOSAIC_INPUTS, flips, strict=True)}
