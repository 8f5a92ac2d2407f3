"""Run lengths and polygons, against pycocotools."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO

from sam2fast.data.masks import decode_runs, parse_rle, polygons_to_runs, resize_nearest
from sam2fast.data.sample import DataError


def test_random_masks_decode_as_encoded():
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = rng.random(rng.integers(1, 40, 2)) < rng.random()
        size, lengths = parse_rle(coco.encode(np.asfortranarray(mask.astype(np.uint8))), "here")
        assert (decode_runs(size, lengths) == mask).all()
        assert (decode_runs(*parse_rle({"size": size, "counts": lengths.tolist()}, "here")) == mask).all()


def test_real_masklets(shared_data):
    content = json.loads((shared_data / "sav" / "sav_000001_auto.json").read_bytes())
    for rle in sum(content["masklet"][::10], []):
        mask = decode_runs(*parse_rle(rle, "here"))
        assert mask.shape == (848, 480) and (mask == coco.decode(rle)).all()


@pytest.mark.parametrize(
    "rle",
    [
        None,
        3,
        [],
        {},
        {"size": [4, 4]},
        {"size": [4], "counts": "4d0"},
        {"size": ["a", 4], "counts": "4d0"},
        {"size": [4, 4], "counts": ""},
        {"size": [4, 4], "counts": []},
        {"size": [4, 4], "counts": "\u20ac"},
        {"size": [0, 4], "counts": ""},
        {"size": [-4, -4], "counts": [16]},
        {"size": [4, 4], "counts": [8, 9]},
        {"size": [4, 4], "counts": [20, -4]},
        {"size": [4, 4], "counts": [10**30]},
        {"size": [4, 4], "counts": ["x"]},
        {"size": [4, 4], "counts": "oooooooooooooo0"},
        {"size": [4, 4], "counts": "o"},
    ],
)
def test_broken_run_lengths_name_their_source(rle):
    with pytest.raises(DataError, match=r"^file\.json, object 7: .*exclude"):
        parse_rle(rle, "file.json, object 7")


def test_cut_run_lengths():
    mask = np.zeros((50, 70), np.uint8, order="F")
    mask[10:40, 20:50] = 1
    counts = coco.encode(mask)["counts"]
    for length in range(len(counts)):
        with pytest.raises(DataError):
            parse_rle({"size": [50, 70], "counts": counts[:length]}, "here")


def test_random_bytes_never_do_harm():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        counts = rng.integers(40, 115, rng.integers(0, 12)).astype(np.uint8).tobytes()
        try:
            size, lengths = parse_rle({"size": [5, 5], "counts": counts}, "here")
        except DataError:
            continue
        assert decode_runs(size, lengths).shape == (5, 5)


def test_real_polygons(shared_data):
    path = shared_data / "coco_mini_val2017" / "instances.json"
    reference = COCO(str(path))
    for annotation in list(reference.anns.values())[:150]:
        image = reference.imgs[annotation["image_id"]]
        if not annotation["iscrowd"]:
            runs = polygons_to_runs(annotation["segmentation"], (image["height"], image["width"]), "here")
            assert (decode_runs(*runs) == reference.annToMask(annotation)).all()


@pytest.mark.parametrize(
    "polygons",
    [
        None,
        "x",
        [["a", "b"]],
        [[0, 0, 5]],
        [[0, 0, 5, float("nan"), 3, 3]],
        [[0, 0, 1e9, 0, 3, 3]],
        [{"x": 1}],
    ],
)
def test_broken_polygons_name_their_source(polygons):
    with pytest.raises(DataError, match=r"^file\.json, annotation 7: .*polygon"):
        polygons_to_runs(polygons, (10, 10), "file.json, annotation 7")


def test_degenerate_polygons_cover_nothing():
    for polygons in ([], [[]], [[1, 1, 5, 5]]):
        assert not decode_runs(*polygons_to_runs(polygons, (10, 10), "here")).any()


def test_nearest_resize_takes_pixel_centers():
    mask = np.arange(6).reshape(1, 6) >= 3
    assert resize_nearest(mask, (2, 3)).tolist() == [[False, True, True]] * 2
    assert resize_nearest(mask, (1, 12)).tolist() == [[False] * 6 + [True] * 6]
