"""J and F against published values of the DAVIS and SA-V benchmarks and against cases small enough to count by hand."""

from __future__ import annotations

import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sam2fast.evaluation.metrics import boundary_accuracy, boundary_map, region_similarity, scored_frames

SEQUENCES = ("blackswan", "bmx-trees", "car-shadow", "horsejump-high", "libby", "motocross-jump")
ROUNDING = 5e-4 + 1e-9  # published with three decimals


@lru_cache
def davis_scores(
    root: Path, archive: str, sequence: str, object_id: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """J and F of a sequence without its first and last frame; `object_id` None takes every nonzero label."""
    scores = []
    with zipfile.ZipFile(root / archive) as predictions:
        frames = sorted(n for n in predictions.namelist() if f"{sequence}/" in n and n.endswith(".png"))
        for name in frames[1:-1]:
            labels = np.asarray(Image.open(io.BytesIO(predictions.read(name))))
            prediction = labels > 0 if object_id is None else labels == object_id
            target = np.asarray(Image.open(root / "davis2016/Annotations/480p" / sequence / name.split("/")[-1])) > 0
            scores.append((region_similarity(prediction, target), boundary_accuracy(prediction, target)))
    j, f = np.array(scores).T
    return j, f


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("method", ["osvos", "siammask"])
def test_published_davis_2016_scores_of_every_frame(shared_data, method, sequence):
    published = json.loads((shared_data / f"davis2016_published/per_frame/{method}.json").read_text())[sequence]
    j, f = davis_scores(shared_data, f"davis2016_published/predictions/{method}.zip", sequence)
    np.testing.assert_allclose(j, np.array(published["J"], float), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(f, np.array(published["F"], float), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("method", ["osvos", "siammask"])
def test_official_benchmark_of_the_six_sequences(shared_data, method):
    official = json.loads((shared_data / "davis2016_published/official_sav_benchmark.json").read_text())
    expected = official[f"{method} (6 dev val sequences)"]
    archive = f"davis2016_published/predictions/{method}.zip"
    j, f = (100 * np.mean([davis_scores(shared_data, archive, s)[k].mean() for s in SEQUENCES]) for k in range(2))
    assert (j, f, (j + f) / 2) == pytest.approx((expected["J"], expected["F"], expected["J&F"]), abs=1e-4)


@pytest.mark.parametrize("sequence", ["blackswan", "car-shadow", "libby"])
def test_published_davis_2017_scores_of_an_object(shared_data, sequence):
    folder = "davis2017_osvos_predictions"
    published = json.loads((shared_data / folder / "published_per_object.json").read_text())[f"{sequence}_1"]
    j, f = davis_scores(shared_data, f"{folder}/osvos.zip", sequence, object_id=1)
    assert (j.mean(), f.mean()) == pytest.approx((float(published["J"]), float(published["F"])), abs=5.1e-5)


def test_official_sav_benchmark_with_objects_that_vanish(shared_data):
    """The masklets of a real SA-V video, delayed by one annotated frame; one of them appears late."""
    expected = json.loads((shared_data / "sav/official_sav_benchmark_shift1.json").read_text())
    masklet = json.loads((shared_data / "sav/sav_000001_manual.json").read_text())["masklet"]
    scores = {}
    for k in range(len(masklet[0])):
        truth = [rle.decode(frame[k]).astype(bool) for frame in masklet]
        first = next(t for t, target in enumerate(truth) if target.any())
        pairs = [(truth[t - 1], truth[t]) for t in scored_frames(range(len(truth)), first)]
        scores[f"{k:03d}"] = {
            "J": 100 * np.mean([region_similarity(*pair) for pair in pairs]),
            "F": 100 * np.mean([boundary_accuracy(*pair) for pair in pairs]),
        }
    for name, official in expected["per_object"].items():
        assert scores[name] == pytest.approx(official, abs=1e-9)


def mask(*box: int, size: tuple[int, int] = (100, 100)) -> np.ndarray:
    result = np.zeros(size, bool)
    if box:
        result[box[0] : box[1], box[2] : box[3]] = True
    return result


def test_region_similarity_by_hand():
    assert region_similarity(mask(0, 10, 0, 10), mask(0, 10, 5, 15)) == pytest.approx(50 / 150)
    assert region_similarity(mask(0, 10, 0, 10), mask()) == 0


def test_absent_objects_are_right_where_nothing_is_predicted():
    assert region_similarity(mask(), mask()) == boundary_accuracy(mask(), mask()) == 1
    assert boundary_accuracy(mask(10, 20, 10, 20), mask()) == boundary_accuracy(mask(), mask(10, 20, 10, 20)) == 0


def test_boundary_lies_left_of_and_above_an_edge():
    expected = mask(1, 4, 1, 4, size=(6, 6))
    expected[2:3, 2:3] = False
    assert (boundary_map(mask(2, 4, 2, 4, size=(6, 6))) == expected).all()
    assert not boundary_map(np.ones((6, 6), bool)).any()


def test_boundary_accuracy_tolerates_ceil_of_the_share_of_the_diagonal():
    """The diagonal of 100 x 100 pixels is 141.4: 0.008 of it is 1.13, which is rounded up to 2."""
    target = mask(30, 60, 30, 60)
    assert boundary_accuracy(np.roll(target, 2, axis=1), target) == 1
    assert boundary_accuracy(np.roll(target, 3, axis=1), target) < 1
    assert boundary_accuracy(np.roll(target, 40, axis=1), target) == 0


def test_a_disk_does_not_reach_its_corners():
    """Shifted by (2, 2), the corner of the boundary is 2.8 pixels away from where it was."""
    target = mask(30, 60, 30, 60)
    assert 0 < boundary_accuracy(np.roll(target, (2, 2), axis=(0, 1)), target) < 1


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(100, 100\) and \(100, 99\)"):
        region_similarity(mask(), mask(size=(100, 99)))
    with pytest.raises(ValueError, match="must be bool, got uint8"):
        boundary_accuracy(mask().astype(np.uint8), mask())


def test_scored_frames_leave_out_the_first_the_last_and_those_before_the_object():
    assert scored_frames([0, 4, 8, 12], first=0) == [4, 8]
    assert scored_frames([0, 4, 8, 12], first=8) == [8]
    assert scored_frames([0, 4, 8, 12], first=12) == scored_frames([0, 4], first=0) == []
