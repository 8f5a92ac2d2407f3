"""Masks predicted from one prompt per object, scored by mean IoU and by COCO's mask average precision.

Records carry no class names, so the precision is class-agnostic: it says how well the predicted IoU ranks the masks and
how many of them are good. Scores are in points (0 to 100).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..data.sample import DataError, Dataset, VideoRecord
from ..models.sam2 import SAM2
from ..parallel import HERE
from .metrics import region_similarity

PromptKind = Literal["click", "box"]
_OBJECTS_AT_ONCE = 64


@dataclass(frozen=True)
class ImageScore:
    """The N objects of an image and what was predicted for them, in one order."""

    image: str
    size: tuple[int, int]
    """Height and width in pixels."""
    targets: list[dict[str, Any]]
    """Compressed COCO run lengths."""
    predictions: list[dict[str, Any]]
    """Compressed COCO run lengths."""
    confidences: list[float]
    """Predicted IoU."""
    ious: list[float]
    """True IoU, 0 to 1."""


@dataclass(frozen=True)
class ImageResult:
    """Scores of the images of a dataset (or, before `merge`, of one rank's share of it)."""

    dataset: str
    images: tuple[ImageScore, ...]

    @staticmethod
    def merge(results: Iterable[ImageResult]) -> ImageResult:
        """The result of the whole dataset from those of all ranks, in the order of image names."""
        results = list(results)
        images = sorted((image for result in results for image in result.images), key=lambda image: image.image)
        return ImageResult(results[0].dataset, tuple(images))

    @property
    def num_objects(self) -> int:
        return sum(len(image.ious) for image in self.images)

    def scores(self) -> dict[str, float]:
        """In points: `miou`, mean over objects, and `map`, mask AP averaged over IoU thresholds 0.50 to 0.95.

        Raises:
            DataError: there is no object.
        """
        if not self.num_objects:
            raise DataError(f"dataset {self.dataset}: no image has an object to score; check its annotations")
        truth, detections = self._as_coco()
        most = max(len(image.ious) for image in self.images)
        precision = coco_stats(truth, detections, use_categories=False, max_detections=max(100, most))[0]
        ious = [iou for image in self.images for iou in image.ious]
        return {"map": 100 * precision, "miou": 100 * float(np.mean(ious))}

    def _as_coco(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Ground truth and detections as COCO json, all of one category."""
        truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "object"}]}
        detections = []
        for image_id, image in enumerate(self.images, start=1):
            truth["images"].append({"id": image_id, "height": image.size[0], "width": image.size[1]})
            for target, prediction, confidence in zip(image.targets, image.predictions, image.confidences, strict=True):
                common = {"image_id": image_id, "category_id": 1}
                truth["annotations"].append(
                    {
                        **common,
                        "id": len(truth["annotations"]) + 1,
                        "iscrowd": 0,
                        "area": int(rle.area(target)),
                        "bbox": rle.toBbox(target).tolist(),
                        "segmentation": target,
                    }
                )
                detections.append({**common, "segmentation": prediction, "score": confidence})
        return truth, detections


def evaluate_images(
    model: SAM2,
    dataset: Dataset,
    *,
    max_items: int | None = None,
    prompt: PromptKind = "click",
    rank: int = 0,
    world_size: int = 1,
) -> ImageResult:
    """Predict a mask for every object of every image from one prompt that is drawn from the ground truth.

    Args:
        model: a SAM 2 in eval mode on the device to use.
        max_items: only the first images of the dataset; of a video, its first annotated frame is taken.
        prompt: `click`, positive, on the pixel farthest from the object's border; or its tight `box`.
        rank, world_size: this rank takes items rank, rank + world_size, ...; `ImageResult.merge` joins the shares.
    """
    assert not model.training, "call model.eval() before an evaluation"
    count = len(dataset) if max_items is None else min(len(dataset), max_items)
    images = (_evaluate_image(model, dataset[index], prompt) for index in range(rank, count, world_size))
    return ImageResult(dataset.name, tuple(images))


@torch.no_grad()
def _evaluate_image(model: SAM2, record: VideoRecord, prompt: PromptKind) -> ImageScore:
    frame = record.annotated[0]
    side, device = model.arch.image_size, next(model.parameters()).device
    image = torch.from_numpy(np.ascontiguousarray(record.frames([frame])[0])).permute(2, 0, 1)[None]
    image = F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=True)
    features = model.encode_images(image.to(device))
    masks = record.masks(frame)
    result = ImageScore(record.name, record.size, [], [], [], [])
    object_ids = list(masks)
    for start in range(0, len(object_ids), _OBJECTS_AT_ONCE):
        HERE.touch()
        targets = [masks[object_id] for object_id in object_ids[start : start + _OBJECTS_AT_ONCE]]
        points = _prompt_points(targets, prompt, side, device)
        selected = features.select(torch.zeros(len(targets), dtype=torch.long, device=device))
        conditioned = model.condition_on_memory(selected.top, [], frame=0, num_frames=1, initial=True)
        multimask = prompt == "click"
        output = model.predict_masks(conditioned, selected.high_res, points, None, multimask, stable=True)
        result.confidences.extend(output.ious.max(dim=1).values.float().tolist())
        for target, logits in zip(targets, output.best, strict=True):
            upsampled = F.interpolate(logits[None].float(), record.size, mode="bilinear", align_corners=False)[0, 0]
            prediction = (upsampled > 0).cpu().numpy()
            result.targets.append(_encode(target))
            result.predictions.append(_encode(prediction))
            result.ious.append(region_similarity(prediction, target))
    return result


def coco_stats(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], use_categories: bool = True, max_detections: int = 100
) -> list[float]:
    """The twelve COCO mask scores, 0 to 1 (-1 where there is nothing to score), over all images of `truth`.

    AP at IoU 0.50:0.95, 0.50 and 0.75; AP of small, medium and large objects; AR with 1, 10 and `max_detections` masks
    per image; AR of small, medium and large objects. An image without detections counts too: leaving it out would
    drop its missed objects.

    Args:
        truth: content of a COCO instances json.
        detections: COCO results, at least one, with `image_id`, `category_id`, `segmentation` (RLE) and `score`.
    """
    assert detections
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = truth
        ground_truth.createIndex()
        # loadRes adds fields to the entries it is given
        evaluation = COCOeval(ground_truth, ground_truth.loadRes([dict(entry) for entry in detections]), "segm")
        evaluation.params.useCats = int(use_categories)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # [T, R, K, A, M], [T, K, A, M]
    return [
        *(_mean(part) for part in (precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2])),
        *(_mean(precision[..., area, 2]) for area in (1, 2, 3)),
        *(_mean(recall[..., 0, most]) for most in (0, 1, 2)),
        *(_mean(recall[..., area, 2]) for area in (1, 2, 3)),
    ]


def _mean(values: np.ndarray) -> float:
    """Mean over the categories and thresholds that have ground truth (pycocotools marks the others by -1)."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _prompt_points(
    masks: Sequence[np.ndarray], prompt: PromptKind, side: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts of bool masks [H, W] in pixels of the square input: coordinates [N, P, 2] and labels [N, P]."""
    height, width = masks[0].shape
    coordinates = np.stack([_center(mask) if prompt == "click" else _corners(mask) for mask in masks])
    points = torch.from_numpy(coordinates * (side / np.array([width, height]))).float().to(device)
    labels = torch.tensor([1] if prompt == "click" else [2, 3], dtype=torch.int32, device=device)
    return points, labels.expand(len(masks), -1)


def _center(mask: np.ndarray) -> np.ndarray:
    """The pixel farthest from the border of the object or the image, [1, 2]."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return np.array([[x, y]], np.float64)


def _corners(mask: np.ndarray) -> np.ndarray:
    """Upper left and lower right pixel of the object, [2, 2]."""
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([[x[0], y[0]], [x[-1], y[-1]]], np.float64)


def _encode(mask: np.ndarray) -> dict[str, Any]:
    return rle.encode(np.asfortranarray(mask, dtype=np.uint8))
