"""Counting the objects of a dataset, and keeping the counts."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest

from sam2fast.config import DatasetConfig, MixItem
from sam2fast.data import index as index_module
from sam2fast.data.formats import open_dataset
from sam2fast.data.index import ObjectCounts, object_counts
from sam2fast.data.sample import DataError
from sam2fast.data.synthetic import write_dataset

ITEM = MixItem(dataset="data")


def count(root, item=ITEM, cache=None, **options):
    """Counts of each record, and what was reported."""
    config, said = DatasetConfig(root=str(root), **options), []
    counts = object_counts(open_dataset(config, "data", 0), config, item, 0, said.append, cache)
    return [counts[record].tolist() for record in range(len(counts))], said


def forbid_counting(monkeypatch):
    def fail(*_):
        raise AssertionError("counted again")

    monkeypatch.setattr(index_module, "_count_all", fail)


def test_counts_are_those_of_the_masks(video_folder):
    root = video_folder({"a": 4, "b": 3})  # object 2 in even frames; 100 pixels each of 2400
    assert count(root)[0] == [[2, 1, 2, 1], [2, 1, 2]]
    assert count(root, include=("b",))[0] == [[2, 1, 2]]
    for limits in ({"min_area": 101}, {"min_area": 0.05}, {"max_area": 0.04}):
        assert count(root, MixItem(dataset="data", **limits))[0] == [[0] * 4, [0] * 3]
    assert count(root, MixItem(dataset="data", min_area=100, max_area=0.05))[0] == [[2, 1, 2, 1], [2, 1, 2]]


@pytest.mark.parametrize("kind", ["sav", "sa1b", "sa1b_tar", "coco", "video_folder"])
def test_every_format_counts_what_training_finds(kind, tmp_path):
    write_dataset(tmp_path / "data", kind.removesuffix("_tar"), 3, frames=4, size=(64, 96), tar=kind.endswith("_tar"))
    config = DatasetConfig(root=str(tmp_path / "data"))
    dataset = open_dataset(config, "data", 0)
    counts = object_counts(dataset, config, ITEM, 0)
    assert len(counts) == len(dataset) == 3
    for record in range(3):
        assert counts[record].tolist() == [len(dataset[record].masks(frame)) for frame in dataset[record].annotated]
    again = object_counts(open_dataset(config, "data", 0), config, ITEM, 0)
    assert again.counts.tolist() == counts.counts.tolist() and again.ends.tolist() == counts.ends.tolist()


def test_counts_are_kept_beside_the_data(video_folder, monkeypatch):
    root = video_folder({"a": 4, "b": 3})
    first = count(root)
    assert len(list((root / ".sam2fast").iterdir())) == 1
    with monkeypatch.context() as patch:
        forbid_counting(patch)
        assert count(root) == first
        with pytest.raises(AssertionError, match="counted again"):
            count(root, MixItem(dataset="data", min_area=7))
    shutil.rmtree(root / "Annotations/b")
    shutil.copytree(root / "Annotations/a", root / "Annotations/b")
    shutil.copytree(root / "JPEGImages/a", root / "JPEGImages/b", dirs_exist_ok=True)
    assert count(root)[0] == [[2, 1, 2, 1]] * 2
    assert len(list((root / ".sam2fast").iterdir())) == 1  # those of the old state are gone
    for path in (root / ".sam2fast").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert count(root)[0] == [[2, 1, 2, 1]] * 2


def test_counts_of_single_files_are_kept(tmp_path, monkeypatch):
    """The folder that the counts are written to is the one whose time says whether they hold."""
    write_dataset(tmp_path / "data", "sa1b", 3, size=(64, 96))
    first = count(tmp_path / "data")
    with monkeypatch.context() as patch:
        forbid_counting(patch)
        assert count(tmp_path / "data") == first


def test_data_that_cannot_be_written_is_counted_into_the_cache_folder(video_folder, tmp_path, monkeypatch):
    root, cache = video_folder({"a": 2}), tmp_path / "cache"
    (root / ".sam2fast").write_text("a file where the folder would be")  # also where tests run as root
    first = count(root, cache=cache)
    assert len(list(cache.iterdir())) == 1
    forbid_counting(monkeypatch)
    assert count(root, cache=cache) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    with pytest.raises(AssertionError, match="counted again"):
        count(root)


def test_counting_by_processes_changes_nothing(video_folder, monkeypatch):
    root = video_folder({f"{number:02d}": 1 + number % 3 for number in range(70)})
    here, said = count(root)
    assert said == []
    shutil.rmtree(root / ".sam2fast")
    monkeypatch.setattr(index_module, "_PATIENCE", 0.0)
    others, said = count(root)
    assert others == here and len(said) == 1 and "counting the objects of 70 videos or images" in said[0]


class Fatal:
    """A dataset whose records end the process that counts them."""

    name = "data"

    def __len__(self):
        return 8

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    def sources(self):
        return []


def test_a_counting_process_that_is_killed_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_PATIENCE", -1.0)
    with pytest.raises(DataError, match="dataset 'data': a process that counted .* of 8 .* memory may have run out"):
        object_counts(Fatal(), DatasetConfig(root=str(tmp_path)), ITEM, 0)


def test_damaged_annotations_are_left_to_training(tmp_path):
    write_dataset(tmp_path / "data", "sa1b", 3, size=(64, 96))
    damaged = sorted((tmp_path / "data").rglob("*.json"))[1]
    damaged.write_text(json.dumps({"annotations": [{"segmentation": {"size": [4, 4], "counts": [3]}}]}))
    counts, _ = count(tmp_path / "data")
    assert counts[1] == [] and counts[0] and counts[2]
    empty = sorted((tmp_path / "data").rglob("*.json"))[0]
    empty.write_text(json.dumps({"annotations": []}))
    os.utime(empty.parent)
    assert count(tmp_path / "data")[0][0] == [0]


def test_first_frames():
    counts = ObjectCounts.of([[1, 2, 3, 400], [0, 5, 0, 0], [7], []])
    assert counts[0].tolist() == [1, 2, 3, 255] and counts[3].tolist() == []

    def frames(**options):
        found = counts.first_frames(MixItem(dataset="data", max_objects=4, **options))
        return [found[record].tolist() for record in range(4)]

    assert frames() == [[1, 2, 3, 4], [4], [4], []]
    assert counts.first_frames(MixItem(dataset="data", max_objects=1000))[0].tolist() == [1, 2, 3, 255]
    assert frames(frames=3) == [[1, 2], [4], [], []]
    assert frames(frames=3, reverse=1.0) == [[3, 4], [], [], []]
    assert frames(frames=3, reverse=0.5) == [[1, 2, 3, 4], [4], [], []]
    assert frames(frames=2, stride=(3, 3)) == [[1], [], [], []]
    assert frames(frames=3, visible="window") == [[3, 4], [4, 4], [], []]
    drawn = counts.first_frames(MixItem(dataset="data", max_objects=4)).draw(
        np.arange(4).repeat(50), np.random.default_rng(0)
    )
    assert set(drawn[:50]) == {1, 2, 3, 4} and set(drawn[50:150]) == {4} and set(drawn[150:]) == {4}
