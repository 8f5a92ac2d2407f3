"""Masks of a frame: run lengths and polygons against pycocotools, squares against the resampling of full-size masks."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO

from sam2fast.config import AugmentConfig
from sam2fast.data.augment import Geometry, draw_geometry, plain_geometry
from sam2fast.data.masks import FrameMasks, label_masks, polygons_to_rle, resize_nearest, run_length_masks
from sam2fast.data.sample import DataError

SIDE = 96


def no_warning(message: str) -> None:
    raise AssertionError(message)


def encode(mask: np.ndarray) -> dict:
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def read(rles: list, size: tuple[int, int], warn: Callable[[str], None] = no_warning) -> FrameMasks:
    return run_length_masks(
        {number: (rle, f"file.json, object {number}") for number, rle in enumerate(rles)}, size, warn
    )


def blobs(size: tuple[int, int], count: int, seed: int = 0) -> list[np.ndarray]:
    """Ellipses that may leave the image; the first is empty."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    masks = [np.zeros(size, bool)]
    for _ in range(count - 1):
        (cy, cx), (ry, rx) = rng.random(2) * size, (0.05 + 0.4 * rng.random(2)) * size
        masks.append(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    return masks


def test_random_masks_decode_as_encoded():
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = tuple(int(side) for side in rng.integers(1, 40, 2))
        masks = [rng.random(size) < rng.random() for _ in range(3)]
        rles = [encode(mask) for mask in masks]
        flat = masks[2].T.ravel()
        ends = [0, *np.flatnonzero(np.diff(flat.astype(int), prepend=0)).tolist(), flat.size]
        rles[2] = {"size": size, "counts": np.diff(ends).tolist()}
        frame = read(rles, size)
        assert list(frame) == [number for number, mask in enumerate(masks) if mask.any()]
        for number, mask in frame.items():
            assert mask.dtype == bool and (mask == masks[number]).all() and frame.area(number) == mask.sum()


def test_real_masklets(shared_data):
    content = json.loads((shared_data / "sav" / "sav_000001_auto.json").read_bytes())
    for rles in content["masklet"][::10]:
        frame = read(rles, (848, 480))
        for number, rle in enumerate(rles):
            official = coco.decode(rle)
            assert (frame[number] == official).all() if number in frame else not official.any()


def test_masks_of_another_size_are_resized_with_a_warning():
    masks = blobs((40, 60), 3)
    said: list[str] = []
    frame = read([encode(masks[1]), encode(resize_nearest(masks[2], (41, 60)))], (40, 60), said.append)
    assert len(said) == 1 and "object 1" in said[0]
    assert (frame[0] == masks[1]).all() and frame[1].shape == (40, 60)
    squares = frame.resampled([1, 0], plain_geometry((40, 60), SIDE))
    assert (squares[0] == plain_geometry((40, 60), SIDE).mask(frame[1])).all()
    with pytest.raises(DataError, match="object 0: the mask is 60 x 38"):
        read([encode(masks[1][:38])], (40, 60))


def interpolate(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Bilinear interpolation in float64, as the square shows it."""
    if geometry.mosaic:
        cell = interpolate(mask, geometry.cell)
        cells = [np.zeros_like(cell)] * 4
        cells[geometry.mosaic.cell] = cell[:, ::-1] if geometry.mosaic.flips[geometry.mosaic.cell] else cell
        return np.block([cells[:2], cells[2:]])
    share = mask[geometry.source].astype(float)
    for axis, to in enumerate(geometry.target):
        new, old = to.stop - to.start, share.shape[axis]
        place = (np.arange(new) + 0.5) * (old / new) - 0.5
        low = np.floor(place).astype(int)
        pair = [share.take(np.clip(index, 0, old - 1), axis) for index in (low, low + 1)]
        weight = np.expand_dims(place - low, 1 - axis)
        share = (1 - weight) * pair[0] + weight * pair[1]
    square = np.zeros((geometry.side, geometry.side))
    square[geometry.target] = share
    return square[:, ::-1] if geometry.flip else square


@pytest.mark.parametrize("size", [(53, 71), (150, 90), (60, 130)])
def test_run_lengths_are_resampled_without_the_mask(size):
    """Exact where interpolation is not within rounding of one half; `Geometry.mask` rounds weights to 1/256."""
    rng = np.random.default_rng(1)
    masks = blobs(size, 4)
    frame = read([encode(mask) for mask in masks], size)
    config = AugmentConfig(scale=(0.8, 1.4), flip=0.5, degrees=0.0, shear=0.0, mosaic=0.5)
    for geometry in [plain_geometry(size, SIDE), *(draw_geometry(config, size, SIDE, rng) for _ in range(12))]:
        squares = frame.resampled([3, 1, 2], geometry)
        assert squares.dtype == bool and squares.shape == (3, SIDE, SIDE)
        for square, number in zip(squares, [3, 1, 2], strict=True):
            share = interpolate(masks[number], geometry)
            decided = abs(share - 0.5) > 1e-9
            assert (square == (share >= 0.5))[decided].all()
            assert (abs(share - 0.5) <= 2 / 256)[square != geometry.mask(masks[number])].all()


@pytest.mark.parametrize("degrees, side", [(25.0, SIDE), (0.0, 12)])
def test_rotated_and_far_smaller_squares_are_those_of_the_mask(degrees, side):
    """Where areas are averaged, or everything is warped, masks are drawn first."""
    size = (120, 90)
    masks = blobs(size, 3)
    frame = read([encode(mask) for mask in masks], size)
    config = AugmentConfig(degrees=degrees, shear=degrees)
    geometry = draw_geometry(config, size, side, np.random.default_rng(0))
    squares = frame.resampled([2, 1], geometry)
    assert squares.any() and all(
        (square == geometry.mask(masks[n])).all() for square, n in zip(squares, [2, 1], strict=True)
    )


def test_label_images_are_resampled_as_their_masks():
    size = (53, 71)
    labels = np.zeros(size, np.uint8)
    for number, mask in enumerate(blobs(size, 4, seed=2)):
        labels[mask] = number
    frame = label_masks(labels, size)
    config = AugmentConfig(scale=(0.7, 1.4), flip=0.5)
    for seed in range(8):
        geometry = draw_geometry(config, size, SIDE, np.random.default_rng(seed))
        for object_id, square in zip(frame, frame.resampled(list(frame), geometry), strict=True):
            assert (square == geometry.mask(labels == object_id)).all()
    assert frame.resampled([], geometry).shape == (0, SIDE, SIDE)
    assert not frame.resampled([9], geometry).any()


@pytest.mark.parametrize(
    "annotation",
    [
        None,
        3,
        [],
        {},
        {"size": [4, 4]},
        {"size": [4], "counts": "4d0"},
        {"size": ["a", 4], "counts": "4d0"},
        {"size": [float("inf"), 4], "counts": "4d0"},
        {"size": [4, 4], "counts": ""},
        {"size": [4, 4], "counts": []},
        {"size": [4, 4], "counts": None},
        {"size": [4, 4], "counts": "\u20ac"},
        {"size": [0, 4], "counts": ""},
        {"size": [-4, -4], "counts": [16]},
        {"size": [4, 2**40], "counts": [2**42]},
        {"size": [4, 4], "counts": [8, 9]},
        {"size": [4, 4], "counts": [20, -4]},
        {"size": [4, 4], "counts": [10**30]},
        {"size": [4, 4], "counts": [8.0, 8.0]},
        {"size": [4, 4], "counts": ["x"]},
        {"size": [4, 4], "counts": "oooooooooooooo0"},
        {"size": [4, 4], "counts": "o"},
    ],
)
def test_broken_run_lengths_name_their_source(annotation):
    with pytest.raises(DataError, match=r"^file\.json, object 1: .*exclude"):
        read([encode(np.ones((4, 4))), annotation], (4, 4))


def test_cut_run_lengths():
    mask = np.zeros((50, 70))
    mask[10:40, 20:50] = 1
    counts = encode(mask)["counts"]
    for length in range(len(counts)):
        with pytest.raises(DataError, match="object 0: cannot read run lengths"):
            read([{"size": [50, 70], "counts": counts[:length]}], (50, 70))


def test_random_bytes_never_do_harm():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        counts = rng.integers(40, 115, rng.integers(0, 12)).astype(np.uint8).tobytes()
        try:
            frame = read([{"size": [5, 5], "counts": counts}], (5, 5))
        except DataError:
            continue
        assert all(mask.shape == (5, 5) for mask in frame.values())


def draw(polygons: object, size: tuple[int, int]) -> FrameMasks:
    return read([polygons_to_rle(polygons, size, "file.json, annotation 7")], size)


def test_real_polygons(shared_data):
    path = shared_data / "coco_mini_val2017" / "instances.json"
    reference = COCO(str(path))
    for annotation in list(reference.anns.values())[:150]:
        image = reference.imgs[annotation["image_id"]]
        if not annotation["iscrowd"]:
            frame = draw(annotation["segmentation"], (image["height"], image["width"]))
            assert (frame[0] == reference.annToMask(annotation)).all()


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
        polygons_to_rle(polygons, (10, 10), "file.json, annotation 7")


def test_degenerate_polygons_cover_nothing():
    for polygons in ([], [[]], [[1, 1, 5, 5]]):
        assert not draw(polygons, (10, 10))


def test_nearest_resize_takes_pixel_centers():
    mask = np.arange(6).reshape(1, 6) >= 3
    assert resize_nearest(mask, (2, 3)).tolist() == [[False, True, True]] * 2
    assert resize_nearest(mask, (1, 12)).tolist() == [[False] * 6 + [True] * 6]
