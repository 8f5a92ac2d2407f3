"""Objects of SA-V are counted from the annotations: no video is opened for it."""

from __future__ import annotations

import pytest

from sam2fast.config import DatasetConfig, MixItem
from sam2fast.data.formats import open_dataset
from sam2fast.data.index import object_counts
from sam2fast.data.sample import DataError
from sam2fast.data.synthetic import write_dataset


def test_counting_opens_no_video(tmp_path):
    write_dataset(tmp_path / "data", "sav", 2, frames=5, size=(64, 96))
    for path in (tmp_path / "data").rglob("*.mp4"):
        path.write_bytes(b"not a video")
    config = DatasetConfig(root=str(tmp_path / "data"))
    counts = object_counts(open_dataset(config, "data", 0), config, MixItem(dataset="data"), 0)
    assert len(counts) == 2 and counts[0].tolist() and counts[1].tolist()


@pytest.mark.parametrize("read", [lambda video: video.masks(video.annotated[0]), lambda video: video.frames([12])])
def test_video_shorter_than_its_annotation(read, tmp_path):
    write_dataset(tmp_path / "short", "sav", 1, frames=2, size=(64, 96))
    write_dataset(tmp_path / "long", "sav", 1, frames=5, size=(64, 96))
    video = next((tmp_path / "short").rglob("*.mp4"))
    video.replace(next((tmp_path / "long").rglob("*.mp4")))
    record = open_dataset(DatasetConfig(root=str(tmp_path / "long")), "data", 0)[0]
    assert len(record.annotated) == 5
    with pytest.raises(DataError, match=r"\.mp4 has \d+ frames, its annotation goes up to frame .*_manual\.json"):
        read(record)
