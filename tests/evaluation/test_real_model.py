"""The evaluations drive the real model: a micro SAM 2 with random weights."""

from __future__ import annotations

import pytest
import torch
from pycocotools import mask as rle

from sam2fast.config import DatasetConfig
from sam2fast.data.formats import open_dataset
from sam2fast.data.synthetic import write_dataset
from sam2fast.evaluation.coco import evaluate_images
from sam2fast.evaluation.overlays import OverlayWriter
from sam2fast.evaluation.vos import evaluate_vos
from sam2fast.models.architecture import architecture
from sam2fast.models.sam2 import SAM2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SAM2(architecture("micro", image_size=64)).eval()


def test_a_prompted_mask_comes_back_in_its_place(records, model):
    """The late object is prompted on frame 4, which is the only one it counts on: 6 is the last."""
    records[1].annotated = [0, 2, 4, 6]
    del records[0]
    result = evaluate_vos(model, records, max_frames=7)
    late = next(score for score in result.objects if score.object_id == 7)
    assert late.num_frames == 1 and late.j > 85 and late.copy_j == 100


def test_videos_from_disk(tmp_path, model):
    root = write_dataset(tmp_path / "data", "sav", 2, 3, frames=3, size=(48, 64))
    dataset = open_dataset(DatasetConfig(root=str(root)), "synthetic", seed=0)
    result = evaluate_vos(model, dataset, save=OverlayWriter(tmp_path / "overlays", max_videos=1))
    assert {score.video for score in result.objects} == {dataset[0].name, dataset[1].name}
    assert all(0 <= value <= 100 for value in result.scores().values())
    assert {path.suffix for path in (tmp_path / "overlays").iterdir()} == {".png", ".mp4"}


@pytest.mark.parametrize("prompt", ["click", "box"])
def test_images_from_disk(tmp_path, model, prompt):
    root = write_dataset(tmp_path / "data", "coco", 2, 3, size=(48, 64))
    dataset = open_dataset(DatasetConfig(root=str(root)), "synthetic", seed=0)
    result = evaluate_images(model, dataset, prompt=prompt)
    assert result.num_objects == sum(len(dataset[i].masks(0)) for i in range(2))
    for image in result.images:
        again = rle.iou(image.predictions, image.targets, [0] * len(image.targets)).diagonal()
        assert image.ious == pytest.approx(again.tolist())
    assert result.scores().keys() == {"map", "miou"}
