"""Clicks, boxes and coarse masks, and the distribution of plans."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sam2fast.config import PromptConfig, PromptMix
from sam2fast.models.plan import draw_plan
from sam2fast.models.prompts import coarse_mask, mask_to_box, sample_box, sample_click


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def follows(counts, expected=None) -> bool:
    """Pearson's chi-square test of counts against expected ones (by default equal), at four standard deviations."""
    counts = np.asarray(counts, dtype=float)
    expected = np.full(len(counts), counts.mean()) if expected is None else np.asarray(expected)
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def rectangle(size: int, top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return mask


def test_first_click_falls_on_the_object_and_on_the_background_of_an_absent_one():
    truth = torch.cat([rectangle(8, 2, 3, 4, 6), rectangle(8, 0, 0, 0, 0)])
    for method in ("uniform", "center"):
        coords, labels = sample_click(truth, None, method)
        x, y = coords[0, 0].long()
        assert truth[0, y, x] and labels.tolist() == [[1], [0]]
        assert coords.dtype == torch.float32 and labels.dtype == torch.int32


def test_next_click_falls_on_an_error_of_low_resolution_logits():
    """Of three objects in the corner, one is predicted with another one, one not at all, and one but for its corner."""
    truth = rectangle(32, 0, 0, 16, 16).expand(3, -1, -1)
    logits = torch.full((3, 1, 8, 8), -5.0)
    logits[::2, 0, :4, :4] = logits[0, 0, 4:] = 5.0
    predicted = F.interpolate(logits, scale_factor=4, mode="bilinear")[:, 0] > 0
    objects = torch.arange(3)
    for method in ("uniform", "center"):
        coords, labels = sample_click(truth, logits, method)
        x, y = coords[:, 0].long().unbind(-1)
        assert (truth != predicted)[objects, y, x].all()
        assert torch.equal(labels[:, 0].bool(), truth[objects, y, x])
        assert labels.tolist() == [[0], [1], [1]]
    assert coords[1].tolist() == [[7, 7]]


def test_box_is_tight_and_noise_stays_within_both_bounds():
    masks = torch.cat([rectangle(64, 8, 4, 40, 60), rectangle(64, 30, 30, 31, 31)])
    assert mask_to_box(masks).tolist() == [[4, 8, 59, 39], [30, 30, 30, 30]]
    coords, labels = sample_box(masks, noise=0, bound=20)
    assert coords.tolist() == [[[4, 8], [59, 39]], [[30, 30], [30, 30]]] and labels.tolist() == [[2, 3], [2, 3]]

    exact = coords[0].expand(2000, 2, 2)
    shift = sample_box(masks[:1].expand(2000, -1, -1), noise=0.1, bound=4)[0] - exact
    assert shift[..., 0].abs().max().item() == pytest.approx(4, abs=0.1)  # bound: 0.1 * 55 > 4
    assert shift[..., 1].abs().max().item() == pytest.approx(3.1, abs=0.1)  # share: 0.1 * 31
    assert shift.mean().abs() < 0.1


def test_box_of_an_absent_object_stays_in_the_image():
    coords, _ = sample_box(rectangle(32, 0, 0, 0, 0), noise=0.1, bound=20)
    assert coords.min() >= 0 and coords.max() <= 31


def test_coarse_mask_is_near_the_mask_but_not_the_mask():
    truth = rectangle(128, 20, 20, 92, 100)
    truth[:, 52:56] = False  # a gap that closing fills
    logits = coarse_mask(truth.expand(200, -1, -1), noise=0.1, bound=20)
    assert logits.shape == (200, 1, 32, 32) and set(logits.unique().tolist()) == {-10, 10}
    drawn, small = logits[:, 0] > 0, truth[:, 2::4, 2::4]
    overlap = (drawn & small).sum((1, 2)) / (drawn | small).sum((1, 2))
    assert overlap.min() > 0.5 and overlap.max() > 0.85
    assert len(drawn.flatten(1).unique(dim=0)) > 20
    filled = drawn[:, 8:20, 14].all(1)  # down the middle of the object
    assert 0.1 < filled.float().mean() < 0.9
    exact = coarse_mask(truth, noise=0, bound=20)[:, 0] > 0
    assert torch.equal(exact, small)


def test_coarse_mask_keeps_small_objects_and_empty_masks():
    masks = torch.cat([rectangle(64, 20, 20, 28, 28), rectangle(64, 9, 9, 10, 10), rectangle(64, 0, 0, 0, 0)])
    for _ in range(20):
        drawn = coarse_mask(masks, noise=0.1, bound=20) > 0
        assert drawn.flatten(1).any(1).tolist() == [True, True, False]


def kind(plan) -> str:
    return f"{plan.mode} {len(plan.init_frames)} {len(plan.correct_frames)}"


def test_plans_of_videos_follow_the_official_probabilities():
    rng = np.random.default_rng(0)
    plans = [draw_plan(PromptConfig(), 8, rng) for _ in range(20_000)]
    kinds = Counter(map(kind, plans))
    expected = {"mask 1 0": 0.25, "mask 2 0": 0.25, "point 1 1": 0.125, "point 1 2": 0.125, "point 2 2": 0.25}
    assert kinds.keys() == expected.keys()
    assert follows([kinds[name] for name in expected], [20_000 * p for p in expected.values()])

    boxes = [box for plan in plans for box in plan.box]
    assert np.mean(boxes) == pytest.approx(0.5, abs=4 * 0.5 / len(boxes) ** 0.5)
    assert all(len(plan.box) == (plan.mode == "point") * len(plan.init_frames) for plan in plans)
    clicks = [click for plan in plans for frame in plan.click_from_gt for click in frame]
    assert len(clicks) == 7 * sum(len(plan.correct_frames) for plan in plans)
    assert np.mean(clicks) == pytest.approx(0.1, abs=4 * 0.3 / len(clicks) ** 0.5)
    for second in (lambda plan: plan.init_frames[1:], lambda plan: plan.correct_frames[1:]):
        frames = Counter(frame for plan in plans for frame in second(plan))
        assert sorted(frames) == list(range(1, 8)) and follows(list(frames.values()))


def test_plans_start_at_the_first_frame_and_correct_the_initial_ones_first():
    rng = np.random.default_rng(1)
    config = PromptConfig(init_frames=3, corrected_frames=4)
    for plan in (draw_plan(config, 6, rng) for _ in range(300)):
        assert plan.init_frames[0] == 0 and sorted(plan.order) == list(range(6))
        assert plan.order[: len(plan.init_frames)] == plan.init_frames
        tracked = plan.order[len(plan.init_frames) :]
        assert list(tracked) == sorted(tracked)
        if plan.mode == "point":
            assert plan.correct_frames[: len(plan.init_frames)] == plan.init_frames
            positions = [plan.order.index(t) for t in plan.correct_frames]
            assert positions == sorted(positions)
        assert all(plan.is_conditioning(t) for t in plan.init_frames + plan.correct_frames)


def test_plans_of_images_take_points_and_are_corrected():
    rng = np.random.default_rng(2)
    plans = [draw_plan(PromptConfig(), 1, rng) for _ in range(20_000)]
    assert set(map(kind, plans)) == {"point 1 1"}
    assert np.mean([plan.box[0] for plan in plans]) == pytest.approx(0.5, abs=0.015)

    mix = PromptMix(mask=0.2, click=0.5, box=0.3)
    plans = [draw_plan(PromptConfig(image=mix), 1, rng) for _ in range(20_000)]
    kinds = Counter(plan.mode if plan.mode != "point" else ("click", "box")[plan.box[0]] for plan in plans)
    assert follows([kinds[k] for k in ("coarse_mask", "click", "box")], [4_000, 10_000, 6_000])


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"random_init_frames": False, "random_corrected_frames": False}, {"mask 2 0", "point 2 2"}),
        ({"corrected_frames": 0}, {"mask 1 0", "mask 2 0", "point 1 0", "point 2 0"}),
        ({"correction_clicks": 0}, {"mask 1 0", "mask 2 0", "point 1 0", "point 2 0"}),
        ({"init_frames": 1, "corrected_frames": 1}, {"mask 1 0", "point 1 1"}),
        ({"video": PromptMix(mask=1, click=0, box=0)}, {"mask 1 0", "mask 2 0"}),
    ],
)
def test_options_of_plans(options, kinds):
    rng = np.random.default_rng(3)
    assert {kind(draw_plan(PromptConfig(**options), 4, rng)) for _ in range(300)} == kinds


def test_equal_generators_draw_equal_plans():
    first, second = (np.random.default_rng(5) for _ in range(2))
    for num_frames in (8, 1, 2, 4) * 20:
        assert draw_plan(PromptConfig(), num_frames, first) == draw_plan(PromptConfig(), num_frames, second)
