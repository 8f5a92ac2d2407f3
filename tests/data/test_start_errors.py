"""What stops a run before or at its first sample: each one error that names the file and the remedy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data.bad_records import BadRecords
from sam2fast.data.formats import open_dataset
from sam2fast.data.loaders import build_loader
from sam2fast.data.sample import DataError
from sam2fast.data.sampling import ClipDataset
from sam2fast.data.synthetic import write_dataset


def open_at(root: Path, **options):
    return open_dataset(DatasetConfig(root=str(root), **options), "data", 0)


def clips(dataset, **options) -> ClipDataset:
    return ClipDataset(dataset, MixItem(dataset="data", **options), AugmentConfig(), 64, seed=0)


def test_clip_length_that_no_video_has(video_folder):
    dataset = open_at(video_folder({"a": 3, "b": 5, "c": 4}))
    clips(dataset, frames=3, stride=(2, 9))
    with pytest.raises(
        DataError, match=r"'data': no video .* clips of 4 frames at stride 2, which need 7 .* 'b', has 5"
    ):
        clips(dataset, frames=4, stride=(2, 2))


def test_clips_of_images(tmp_path):
    write_dataset(tmp_path, "sa1b", 2, size=(64, 96))
    with pytest.raises(DataError, match=r"images have `frames: 1`"):
        clips(open_at(tmp_path), frames=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_that_can_be_used(workers, video_folder):
    root = video_folder({f"video{number}": 3 for number in range(5)})
    for path in root.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    loader = build_loader(clips(open_at(root), frames=2), 1, workers=workers, bad_records=BadRecords({"data": 5}, 1))
    with pytest.raises(DataError, match="^dataset 'data': no record could be used") as caught:
        next(loader)
    text = str(caught.value)
    assert "min_area" not in text and text.count("cannot decode") == 3 and text.count("\n") == 3


@pytest.mark.parametrize("format_name", ["auto", "sa1b", "coco"])
def test_images_without_annotations(format_name, tmp_path):
    cv2.imwrite(str(tmp_path / "one.jpg"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"one\.jpg (has no annotation|needs one\.json).*`annotations`") as caught:
        open_at(tmp_path, format=format_name)
    assert "'data'" in str(caught.value)


def test_annotations_without_images(tmp_path):
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(DataError, match=r"none of its 1 annotations .*one\.json needs one\.jpg in .*`root`"):
        open_at(tmp_path, format="sa1b")


@pytest.mark.parametrize("tar", [False, True])
def test_images_of_one_name_in_two_folders(tar, tmp_path):
    for folder in ("a", "b"):
        write_dataset(tmp_path / folder, "sa1b", 2, size=(64, 96), tar=tar)
    with pytest.raises(DataError, match=r"names must differ between folders, 2 do not: .*/a/.* and .*/b/.*; rename"):
        open_at(tmp_path, format="sa1b")
    assert len(open_at(tmp_path / "a", format="sa1b")) == 2


def test_annotations_elsewhere_come_before_those_beside_the_images(tmp_path):
    write_dataset(tmp_path / "data", "sa1b", 2, size=(64, 96))
    for path in (tmp_path / "data").rglob("*.json"):
        (tmp_path / "better").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "better")
        path.write_text("old")
    dataset = open_at(tmp_path / "data", format="sa1b", annotations=str(tmp_path / "better"))
    assert len(dataset) == 2 and len(dataset[0].masks(0)) and re.search("better", str(dataset.sources()[0]))
