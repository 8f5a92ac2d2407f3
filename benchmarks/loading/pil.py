"""The official trainer's loader with PIL, numpy and torch, stage by stage, on what a `SamplePlan` has drawn.

Its transforms, in its order: flip; affine at the size of the source (images bilinear, masks nearest); resize to the
square (PIL; masks as antialiased uint8, which rounds at one half); color jitter of the clip; grayscale; color jitter of
each frame; float32 tensor; normalization. Color factors of the clip are the geometric means over its frames, those of a
frame are the rest. Crop, padding and blur, which it does not have, are PIL's too.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from sam2fast.data.augment import FILL, Geometry
from sam2fast.data.render import SamplePlan

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def decode(files: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


def decode_masks(files: list[bytes], object_ids: list[int]) -> list[np.ndarray]:
    """uint8 [O, H, W] of each frame; an absent object is empty."""
    labels = [np.array(Image.open(io.BytesIO(data))) for data in files]
    return [np.stack([image == object_id for object_id in object_ids]).astype(np.uint8) for image in labels]


def augment(plan: SamplePlan, images: list[Image.Image], masks: list[np.ndarray]) -> tuple[list[Tensor], list[Tensor]]:
    """Normalized float32 [3, S, S] and bool [O, S, S] of each frame."""
    place = _place_affine if plan.geometry.matrix is not None else _place_crop
    placed = [place(plan.geometry, image, mask) for image, mask in zip(images, masks, strict=True)]
    clip = np.exp(np.log(np.maximum(plan.colors, 1e-6)).mean(0))
    frames = []
    for (image, _), factors in zip(placed, plan.colors, strict=True):
        image = _jitter(image, clip)
        if not plan.colors[:, 2].any():
            image = ImageOps.grayscale(image).convert("RGB")
        image = _jitter(image, factors / clip)
        if plan.sigma:
            image = image.filter(ImageFilter.GaussianBlur(plan.sigma))
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        frames.append((tensor - MEAN) / STD)
    return frames, [mask.bool() for _, mask in placed]


def collate(frames: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
    """Frames float32 [T, 1, 3, S, S] and masks bool [T, O, S, S]."""
    return {"frames": torch.stack(frames)[:, None], "masks": torch.stack(masks)}


def _jitter(image: Image.Image, factors: np.ndarray) -> Image.Image:
    for enhance, factor in zip(ENHANCERS, factors, strict=True):
        image = enhance(image).enhance(factor)
    return image


def _place_affine(geometry: Geometry, image: Image.Image, masks: np.ndarray) -> tuple[Image.Image, Tensor]:
    """Rotation and shear at the size of the source, then the resize to the square."""
    width, height = image.size
    forward = np.diag([width / geometry.side, height / geometry.side]) @ _corners(geometry.matrix)
    if np.linalg.det(forward[:, :2]) < 0:
        image, masks = ImageOps.mirror(image), masks[..., ::-1]
        forward = forward @ [[-1, 0, width], [0, 1, 0], [0, 0, 1]]
    inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))[:2].ravel().tolist()
    size, method = (width, height), Image.Transform.AFFINE
    image = image.transform(size, method, inverse, Image.Resampling.BILINEAR, fillcolor=FILL)
    warped = [np.array(Image.fromarray(mask).transform(size, method, inverse)) for mask in np.ascontiguousarray(masks)]
    square = (geometry.side, geometry.side)
    return image.resize(square, Image.Resampling.BILINEAR), _resize(np.stack(warped), square)


def _corners(matrix: np.ndarray) -> np.ndarray:
    """An affine map of pixel centers as one of coordinates that count from the corner of the first pixel."""
    linear, offset = matrix[:, :2], matrix[:, 2]
    return np.column_stack([linear, offset + 0.5 - linear @ [0.5, 0.5]])


def _place_crop(geometry: Geometry, image: Image.Image, masks: np.ndarray) -> tuple[Image.Image, Tensor]:
    """Flip, crop, resize, padding."""
    (rows, columns), (target_rows, target_columns) = geometry.source, geometry.target
    left, target_left = columns.start, target_columns.start
    if geometry.flip:
        image, masks = ImageOps.mirror(image), masks[..., ::-1]
        left, target_left = image.size[0] - columns.stop, geometry.side - target_columns.stop
    box = (left, rows.start, left + columns.stop - columns.start, rows.stop)
    size = (target_columns.stop - target_columns.start, target_rows.stop - target_rows.start)
    image = image.crop(box).resize(size, Image.Resampling.BILINEAR)
    resized = _resize(np.ascontiguousarray(masks[:, rows, box[0] : box[2]]), size)
    if size == (geometry.side, geometry.side):
        return image, resized
    square = Image.new("RGB", (geometry.side, geometry.side), FILL)
    square.paste(image, (target_left, target_rows.start))
    padded = torch.zeros(len(masks), geometry.side, geometry.side, dtype=torch.uint8)
    padded[:, target_rows, target_left : target_left + size[0]] = resized
    return square, padded


def _resize(masks: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 [O, H, W] to `size` (width, height)."""
    return F.interpolate(torch.from_numpy(masks)[None], size[::-1], mode="bilinear", antialias=True)[0]
