"""Geometry that frames and masks share, and colors."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from sam2fast.config import AugmentConfig
from sam2fast.data.augment import (
    FILL,
    blur,
    color_matrix,
    draw_blur,
    draw_colors,
    draw_geometry,
    plain_geometry,
)

SIDE = 96
OFF = {"flip": 0.0, "scale": (1.0, 1.0), "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "blur": 0.0}


def draw(seed, size=(60, 80), **options):
    return draw_geometry(AugmentConfig(**{**OFF, **options}), size, SIDE, np.random.default_rng(seed))


def look(geometry, image, *colors):
    """uint8 [S, S, 3]"""
    return geometry.image(image, *colors).transpose(1, 2, 0)


def disk(height=60, width=80, y=30, x=40, radius=12):
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


GEOMETRIES = [
    {},
    {"flip": 1.0},
    {"scale": (1.3, 1.3)},
    {"scale": (0.6, 0.6)},
    {"degrees": 30.0, "shear": 15.0},
    {"degrees": 30.0, "shear": 15.0, "scale": (0.7, 1.3), "flip": 0.5},
]


@pytest.mark.parametrize("options", GEOMETRIES)
@pytest.mark.parametrize("size", [(60, 80), (240, 110)])
def test_masks_move_with_their_frames(options, size):
    mask = disk(*size, size[0] // 2, size[1] // 2 + 4, 15)
    image = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, 2)
    for seed in range(4):
        geometry = draw(seed, size, **options)
        moved, seen = geometry.mask(mask), look(geometry, image)[..., 0]
        assert moved.shape == seen.shape == (SIDE, SIDE) and moved.dtype == bool
        assert ((seen > 127) == moved).mean() > 0.995  # the padding is below 127


def test_plain_geometry_is_a_resize():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert abs(look(plain_geometry((60, 80), SIDE), image).astype(int) - cv2.resize(image, (SIDE, SIDE))).max() <= 1
    assert (look(draw(0), image) == look(plain_geometry((60, 80), SIDE), image)).all()
    assert (look(draw(0, flip=1.0), image) == look(plain_geometry((60, 80), SIDE), image)[:, ::-1]).all()


def test_shrinking_averages_areas():
    rows = np.zeros((SIDE * 4, SIDE, 3), np.uint8)
    rows[::4] = 200  # every 4th row: sampling sees 0 or 200, the area average is 50
    for image in (rows, rows.transpose(1, 0, 2)):
        assert (look(plain_geometry(image.shape[:2], SIDE), image) == 50).all()
        warped = look(draw(0, image.shape[:2], shear=1e-9), image)
        assert abs(warped[4:-4, 4:-4].astype(int) - 50).max() <= 1


@pytest.mark.parametrize("size", [(60, 80), (240, 80), (300, 400)])
def test_a_warp_without_rotation_is_the_resize(size):
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8), size[::-1])
    for flip in (0.0, 1.0):
        warped, resized = look(draw(0, size, shear=1e-9, flip=flip), image), look(draw(0, size, flip=flip), image)
        assert abs(warped.astype(int) - resized)[2:-2, 2:-2].max() <= 3


def test_rotation_turns_about_the_center_at_the_aspect_of_the_image():
    mask = disk(60, 80, 30, 60, 6)  # right of the center by 20
    angles = []
    for seed in range(20):
        rows, columns = np.nonzero(draw(seed, degrees=40.0).mask(mask))
        y, x = (rows.mean() + 0.5) * 60 / SIDE - 30, (columns.mean() + 0.5) * 80 / SIDE - 40
        assert abs(np.hypot(x, y) - 20.5) < 0.8
        angles.append(np.rad2deg(np.arctan2(y, x)))
    assert -42 < min(angles) < -10 and 10 < max(angles) < 42


def test_shear_shifts_rows_in_proportion_to_their_height():
    mask = disk(80, 80, 20, 40, 6) | disk(80, 80, 60, 40, 6)
    shifts = []
    for seed in range(12):
        moved = draw(seed, (80, 80), shear=25.0).mask(mask)
        above, below = (np.nonzero(half)[1].mean() - SIDE / 2 for half in (moved[: SIDE // 2], moved[SIDE // 2 :]))
        assert abs(above + below) < 1.5
        shifts.append(below * 80 / SIDE)
    limit = 20 * np.tan(np.deg2rad(25))
    assert -limit - 1 < min(shifts) < -2 and 2 < max(shifts) < limit + 1


def test_scale_crops_or_pads_at_random_places():
    for scale in (1.25, 0.8):
        masks = [draw(seed, scale=(scale, scale)).mask(disk()) for seed in range(12)]
        plain = plain_geometry((60, 80), SIDE).mask(disk())
        assert all(abs(mask.sum() / plain.sum() - scale**2) < 0.1 for mask in masks)
        assert len({tuple(np.argwhere(mask)[0]) for mask in masks}) > 6
    padded = look(draw(0, scale=(0.5, 0.5)), np.zeros((60, 80, 3), np.uint8))
    assert ((padded == 0).all(-1) | (padded == FILL).all(-1)).all() and (padded == 0).all(-1).mean() == 0.25


def test_colors_match_their_definition():
    image = np.random.default_rng(0).integers(60, 190, (32, 32, 3), dtype=np.uint8)
    weights = np.array([0.299, 0.587, 0.114])

    def expected(brightness, contrast, saturation):
        bright = image * brightness
        spread = contrast * bright + (1 - contrast) * (bright @ weights).mean()
        return saturation * spread + (1 - saturation) * (spread @ weights)[..., None]

    def adjusted(*factors):
        return look(plain_geometry((32, 32), 32), image, color_matrix(image, *factors))

    for factors in ((1.2, 1, 1), (1, 0.7, 1), (1, 1, 1.3), (0.8, 1.2, 0.5), (1, 1, 0)):
        assert abs(adjusted(*factors) - expected(*factors)).max() <= 0.51, factors
    assert (adjusted(1, 1, 1) == image).all()
    assert adjusted(2, 1, 1).max() == 255


def test_colors_leave_the_surroundings_alone():
    image = np.full((60, 80, 3), 200, np.uint8)
    dark = look(draw(0, scale=(0.5, 0.5)), image, color_matrix(image, 0.5, 1, 1))
    assert sorted(set(map(tuple, dark.reshape(-1, 3).tolist()))) == [(100, 100, 100), FILL]


def test_color_factors_of_a_clip():
    rng = np.random.default_rng(0)
    clip = draw_colors(AugmentConfig(**{**OFF, "brightness": 0.4, "contrast": 0.2}), 5, rng)
    assert clip.shape == (5, 3) and (clip == clip[0]).all() and (clip[0] != 1).tolist() == [True, True, False]
    frames = draw_colors(AugmentConfig(**OFF, frame_saturation=0.5), 5, rng)
    assert len(set(frames[:, 2])) == 5 and (frames[:, :2] == 1).all() and abs(frames - 1).max() <= 0.5
    assert (draw_colors(AugmentConfig(**OFF, grayscale=1.0), 5, rng)[:, 2] == 0).all()
    strong = draw_colors(AugmentConfig(**{**OFF, "brightness": 5.0}), 200, rng)
    assert strong.min() >= 0


def test_blur():
    rng = np.random.default_rng(0)
    sigmas = [draw_blur(AugmentConfig(blur=0.5), 1024, rng) for _ in range(200)]
    assert 60 < sum(sigma > 0 for sigma in sigmas) < 140 and max(sigmas) <= 2
    planes = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    same, soft = planes.copy(), planes.copy()
    blur(same, 0.0)
    blur(soft, 2.0)
    assert (same == planes).all() and soft.std() < planes.std() / 2
    assert (soft[1] == cv2.GaussianBlur(planes[1], (0, 0), 2.0)).all()


@pytest.mark.parametrize("options", [{}, {"flip": 1.0}, {"scale": (1.3, 1.3)}, {"degrees": 30.0, "shear": 15.0}])
def test_a_mosaic_shows_the_frame_four_times_and_the_objects_once(options):
    mask = disk()
    image = np.where(mask[..., None], np.uint8(255), np.uint8(20)) * np.ones(3, np.uint8)
    half, cells, flips = SIDE // 2, set(), set()
    for seed in range(12):
        geometry = draw(seed, mosaic=1.0, **options)
        seen, moved = look(geometry, image)[..., 0], geometry.masks([mask, ~mask])
        assert seen.shape == (SIDE, SIDE) and moved.shape == (2, SIDE, SIDE)
        corners = [(slice(y, y + half), slice(x, x + half)) for y in (0, half) for x in (0, half)]
        plain = geometry.cell.image(image)[0]
        for place, flip in zip(corners, geometry.mosaic.flips, strict=True):
            assert (seen[place] == (plain[:, ::-1] if flip else plain)).all()
        chosen = corners[geometry.mosaic.cell]
        assert ((seen[chosen] > 127) == moved[0][chosen]).mean() > 0.99
        assert moved[:, *chosen].sum() == moved.sum() > 0
        cells.add(geometry.mosaic.cell)
        flips.update(geometry.mosaic.flips)
    assert len(cells) > 2 and flips == {False, True}
    assert draw(0, **options).mosaic is None


def test_many_masks_move_as_each_alone():
    rng = np.random.default_rng(0)
    masks = [disk(y=rng.integers(60), x=rng.integers(80), radius=rng.integers(1, 30)) for _ in range(19)]
    for size_options in ({"degrees": 20.0}, {"scale": (0.7, 0.7), "flip": 1.0}):
        geometry = draw(3, **size_options)
        assert (geometry.masks(masks) == np.stack([geometry.mask(mask) for mask in masks])).all()
    assert geometry.masks([]).shape == (0, SIDE, SIDE)


def test_the_affine_map_of_a_crop_says_where_its_pixels_go():
    for seed in range(6):
        for options in ({"scale": (1.4, 1.4)}, {"scale": (0.6, 0.6)}, {"degrees": 20.0}):
            geometry = draw(seed, flip=0.5, **options)
            rows, columns = np.nonzero(geometry.mask(disk(y=30, x=40, radius=8)))
            assert abs(geometry.affine() @ [40, 30, 1] - [columns.mean(), rows.mean()]).max() < 0.5


@pytest.mark.parametrize(
    "options", [{}, {"degrees": 20.0, "shear": 10.0}, {"mosaic": 1.0}], ids=["crop", "affine", "mosaic"]
)
@pytest.mark.parametrize("side", [16, 96])
def test_masks_of_labels_are_those_of_each_object(options, side):
    """More objects than one call takes, absent ones, and a square so small that areas are averaged."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, (9, 11), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
    numbers = [3, None, 1, 2, 4, 5, 6, 7, 255, 8, 9]
    for _ in range(4):
        geometry = draw_geometry(AugmentConfig(**options), labels.shape, side, rng)
        want = geometry.masks([None if number is None else labels == number for number in numbers])
        assert np.array_equal(geometry.label_masks(labels, numbers), want)
        assert want[0].any() and not want[1].any() and not want[8].any()
