"""The mask loss of sampled points: an estimate of the whole one, where the model is unsure, repeatable."""

from __future__ import annotations

import pytest
import torch

from sam2fast_kernels import pack_masks
from sam2fast_kernels.mask_loss import mask_loss, sampled_mask_loss


def case(h=7, w=9):
    """Logits of two objects with three masks each, targets four times as large, and predicted IoUs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, h, w, generator=generator) * 4
    targets = torch.rand(2, h * 4, w * 4, generator=generator) < 0.4
    return logits, targets, torch.rand(2, 3, generator=generator)


@pytest.mark.parametrize("packed", [False, True])
def test_uniformly_sampled_points_estimate_the_focal_loss(packed):
    logits, targets, ious = case(h=8, w=8)
    truth = pack_masks(targets) if packed else targets
    generator = torch.Generator().manual_seed(0)
    got = sampled_mask_loss(logits, truth, ious, 200_000, importance=0, packed=packed, generator=generator)
    want = mask_loss(logits, targets, ious)
    torch.testing.assert_close(got.focal, want.focal, rtol=0.05, atol=0)
    torch.testing.assert_close(got.dice, want.dice, rtol=0.02, atol=0)
    for name in ("iou_loss", "iou", "intersection", "union", "present"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_sampled_points_prefer_uncertain_pixels():
    logits = torch.full((1, 1, 32, 32), 9.0)
    logits[..., 16:] = -9.0
    targets = (logits[:, 0] > 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    draws = {
        importance: sampled_mask_loss(
            logits, targets, None, 500, importance=importance, generator=torch.Generator().manual_seed(1)
        ).focal
        for importance in (0.0, 0.75)
    }
    assert draws[0.75] > 1.5 * draws[0.0]


def test_sampled_points_follow_their_generator_and_train():
    logits, targets, ious = case()
    leaf = logits.requires_grad_()
    first, second, other = (
        sampled_mask_loss(leaf, targets, ious, 64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.focal, second.focal) and not torch.equal(first.focal, other.focal)
    (gradient,) = torch.autograd.grad((first.focal + first.dice).sum(), leaf)
    assert gradient.isfinite().all() and gradient.flatten(2).any(-1).all()


@pytest.mark.parametrize("points, importance, message", [(0, 0.5, "num_points must be"), (9, 2.0, "importance must")])
def test_sampled_points_refuse_bad_options(points, importance, message):
    logits, targets, ious = case()
    with pytest.raises(ValueError, match=message):
        sampled_mask_loss(logits, targets, ious, points, importance=importance)
