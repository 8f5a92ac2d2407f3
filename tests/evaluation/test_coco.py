"""Masks from prompts: the scores against published ones, and coordinates on the way in and out."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch import nn

from sam2fast.data.sample import DataError
from sam2fast.evaluation.coco import ImageResult, ImageScore, coco_stats, evaluate_images
from sam2fast.models.sam2 import ImageFeatures

SIDE = 64
ROUND_CORNERS = 1.5
"""Points of IoU lost because bilinear upsampling rounds the corners of a rectangle."""


def test_the_twelve_published_coco_scores(shared_data):
    folder = shared_data / "coco_eval_reference"
    text = (folder / "val2014_fake_eval_res.txt").read_text().split("type=bbox")[0]
    published = [float(value) for value in re.findall(r"= (\d\.\d+)", text)]
    assert len(published) == 12
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    detections = json.loads((folder / "instances_val2014_fakesegm100_results.json").read_text())
    assert coco_stats(truth, detections) == pytest.approx(published, abs=5.1e-4)


class ColorModel(nn.Module):
    """Segments what has the color of the clicked pixel, or fills the box; `shift` moves its masks to the right.

    The image is its own feature map, so a prompt or a mask in wrong coordinates shows at once.
    """

    def __init__(self, shift: int = 0, confidences: tuple[float, ...] = (0.5, 0.9, 0.7)):
        super().__init__()
        self.arch = SimpleNamespace(image_size=SIDE)
        self.weight = nn.Parameter(torch.zeros(()))
        self.shift, self.confidences = shift, confidences
        self.eval()

    def encode_images(self, frames):
        assert frames.shape == (1, 3, SIDE, SIDE) and frames.dtype == torch.uint8
        return ImageFeatures(frames.int(), (frames, frames))

    def condition_on_memory(self, top, memories, frame, num_frames, initial):
        assert initial and not memories
        return top

    def predict_masks(self, image, high_res, points, mask_prompt, multimask, stable):
        coordinates, labels = points
        assert len(image) == len(coordinates) == len(labels) and mask_prompt is None
        assert multimask == (labels.shape[1] == 1)
        masks = []
        for frame, points_P2, kinds in zip(image, coordinates.round().int(), labels.tolist(), strict=True):
            if kinds == [1]:
                x, y = points_P2[0]
                mask = (frame == frame[:, y, x][:, None, None]).all(0)
            else:
                assert kinds == [2, 3]
                (x0, y0), (x1, y1) = points_P2
                mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
                mask[y0 : y1 + 1, x0 : x1 + 1] = True
            masks.append(mask.roll(self.shift, 1)[1::4, 1::4].float() * 8 - 4)
        best = torch.stack(masks)[:, None]
        return SimpleNamespace(best=best, ious=torch.tensor([self.confidences]).expand(len(best), -1))


class Picture:
    """Rectangles of one color each, on a frame twice as wide as the model's input."""

    num_frames, annotated, size = 1, [0], (SIDE, 2 * SIDE)

    def __init__(self, name: str, boxes: list[tuple[int, int, int, int]]):
        self.name, self.boxes = name, boxes

    def masks(self, frame):
        result = {}
        for k, (top, bottom, left, right) in enumerate(self.boxes, start=1):
            result[k] = np.zeros(self.size, bool)
            result[k][top:bottom, left:right] = True
        return result

    def frames(self, indices):
        image = np.zeros((*self.size, 3), np.uint8)
        for k, mask in self.masks(0).items():
            image[mask] = (k, 255 - k, 30)
        return [image for _ in indices]


class Pictures(list):
    name = "pictures"


@pytest.fixture
def pictures():
    return Pictures(
        [Picture("a", [(8, 24, 16, 56), (32, 56, 64, 112)]), Picture("b", [(4, 60, 88, 120)]), Picture("c", [])]
    )


@pytest.mark.parametrize("prompt", ["click", "box"])
def test_a_perfect_model_scores_100(pictures, prompt):
    result = evaluate_images(ColorModel(), pictures, prompt=prompt)
    assert result.num_objects == 3
    assert result.scores() == pytest.approx({"map": 100, "miou": 100}, abs=ROUND_CORNERS)


def test_masks_that_are_off_score_their_iou(pictures):
    """Shifted by 4 of 64 columns, 8 pixels of the frame: the IoU of a width w is (w - 8) / (w + 8)."""
    scores = evaluate_images(ColorModel(shift=4), pictures).scores()
    ious = [(w - 8) / (w + 8) for w in (40, 48, 32)]
    assert scores["miou"] == pytest.approx(100 * np.mean(ious), abs=ROUND_CORNERS)
    assert 0 < scores["map"] < 100


def test_the_confidence_is_that_of_the_best_candidate(pictures):
    result = evaluate_images(ColorModel(), pictures)
    assert result.images[0].confidences == pytest.approx([0.9, 0.9])


def test_precision_rewards_ranking_good_masks_first(pictures):
    images = evaluate_images(ColorModel(), pictures, max_items=1).images
    wrong = evaluate_images(ColorModel(shift=32), pictures, max_items=1).images[0]
    good = images[0]

    def scores(confidences):
        mixed = ImageScore(
            "a", good.size, good.targets, [good.predictions[0], wrong.predictions[1]], confidences, [1.0, 0.0]
        )
        return ImageResult("pictures", (mixed,)).scores()

    assert scores([0.9, 0.1])["map"] > scores([0.1, 0.9])["map"]
    assert scores([0.9, 0.1])["miou"] == 50


def test_more_than_a_hundred_objects_in_an_image_all_count():
    masks = np.eye(128, dtype=np.uint8).reshape(128, 1, 128)
    encoded = [rle.encode(np.asfortranarray(mask)) for mask in masks]
    crowded = ImageScore("crowded", (1, 128), encoded, encoded, [0.5] * 128, [1.0] * 128)
    assert ImageResult("pictures", (crowded,)).scores() == pytest.approx({"map": 100, "miou": 100})


def test_shares_of_two_ranks_merge_to_the_whole(pictures):
    whole = evaluate_images(ColorModel(shift=4), pictures)
    shares = [evaluate_images(ColorModel(shift=4), pictures, rank=rank, world_size=2) for rank in (1, 0)]
    assert ImageResult.merge(shares) == whole


def test_no_object_is_an_error(pictures):
    with pytest.raises(DataError, match="dataset pictures: no image has an object"):
        ImageResult.merge([evaluate_images(ColorModel(), pictures, rank=2, world_size=3)]).scores()
