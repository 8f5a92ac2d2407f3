from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sam2fast.config import LossConfig
from sam2fast.losses import SegmentationLoss, dice_loss, focal_loss, mask_iou, temporal_consistency


def prediction(low_res, ious, object_score, full_res=None):
    return SimpleNamespace(low_res=low_res, ious=ious, object_score=object_score, full_res=full_res)


def random_batch(frames=3, objects=3, candidates=(3, 1), low=6, high=24, dtype=torch.float64, seed=0):
    """Predictions as graph leaves, and ground truth in which object 1 is absent from frame 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    clips = [
        [
            prediction(
                (3 * draw(objects, m, low, low)).requires_grad_(),
                draw(objects, m).sigmoid().requires_grad_(),
                draw(objects, 1).requires_grad_(),
            )
            for m in candidates
        ]
        for _ in range(frames)
    ]
    masks = draw(frames, objects, high, high) > 0.3
    masks[1, 1] = False
    return clips, masks


def leaves(clips):
    return [t for steps in clips for step in steps for t in (step.low_res, step.ious, step.object_score)]


def loop_losses(clips, masks, config, num_objects):
    """The definition of every term, one object and one pixel sum at a time."""
    sums = dict.fromkeys(("focal", "dice", "iou", "object_score", "missed_focal"), 0.0)
    for steps, targets in zip(clips, masks, strict=True):
        for step in steps:
            for n, target in enumerate(targets):
                y = target.double()
                present = bool(target.any())
                score = step.object_score[n, 0].sigmoid()
                sums["object_score"] += -(score.log() if present else (1 - score).log())
                if not present:
                    continue
                costs, errors = [], []
                for m, low in enumerate(step.low_res[n]):
                    x = F.interpolate(low[None, None], target.shape, mode="bilinear", align_corners=False)[0, 0]
                    p = x.sigmoid()
                    p_true = p * y + (1 - p) * (1 - y)
                    balance = 1.0
                    if config.focal_alpha >= 0:
                        balance = config.focal_alpha * y + (1 - config.focal_alpha) * (1 - y)
                    focal = (-balance * (1 - p_true) ** config.focal_gamma * p_true.log()).mean()
                    dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
                    iou = ((x > 0) & target).sum().double() / ((x > 0) | target).sum()
                    difference = step.ious[n, m] - iou
                    errors.append(difference.abs() if config.iou_l1 else difference**2)
                    costs.append((config.focal * focal + config.dice * dice, m, focal, dice))
                _, best, focal, dice = min(costs, key=lambda item: item[0].item())
                sums["focal"] += focal
                sums["dice"] += dice
                sums["iou"] += sum(errors) / len(errors) if config.supervise_all_iou else errors[best]
                sums["missed_focal"] += focal if step.object_score[n, 0] <= 0 else 0.0
    return {name: value / num_objects for name, value in sums.items()}


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(iou_l1=False, supervise_all_iou=False),
        LossConfig(focal_alpha=-1, focal_gamma=1.5, focal=3, dice=2, iou=0.5, object_score=0.1),
        LossConfig(focal_alpha=0.1, focal_gamma=0),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_terms_and_gradients_equal_their_definition(config, fused):
    config = config.model_copy(update={"fused": fused})
    clips, masks = random_batch()
    losses = SegmentationLoss(config)(clips, masks, num_objects=4)
    want = loop_losses(clips, masks, config, num_objects=4)
    for name, value in want.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-12, atol=1e-12)
    mask = config.focal * want["focal"] + config.dice * want["dice"] + config.iou * want["iou"]
    total = mask + config.object_score * want["object_score"]
    torch.testing.assert_close(losses["mask"], mask.detach())
    torch.testing.assert_close(losses["total"], total)
    got_grads = torch.autograd.grad(losses["total"], leaves(clips))
    want_grads = torch.autograd.grad(total, leaves(clips))
    for got, wanted in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_only_total_carries_gradients():
    clips, masks = random_batch()
    losses = SegmentationLoss(LossConfig(temporal=0.5))(clips, masks, num_objects=3)
    assert [name for name, value in losses.items() if value.requires_grad] == ["total"]
    assert all(value.shape == () for value in losses.values())


def test_absent_objects_train_the_object_score_alone():
    clips, masks = random_batch()
    SegmentationLoss(LossConfig())(clips, masks, num_objects=3)["total"].backward()
    for step in clips[1]:
        assert step.low_res.grad[1].abs().max() == 0
        assert step.ious.grad[1].abs().max() == 0
        assert step.object_score.grad[1].abs().min() > 0


def test_without_object_score_every_object_counts_as_present():
    clips, masks = random_batch()
    for step in clips[1]:
        step.object_score = None
    losses = SegmentationLoss(LossConfig())(clips, masks, num_objects=3)
    losses["total"].backward()
    assert all(step.low_res.grad[1].abs().max() > 0 for step in clips[1])


def test_a_sum_over_micro_batches_equals_the_whole_batch():
    clips, masks = random_batch(objects=4)
    loss = SegmentationLoss(LossConfig(temporal=1.0))
    whole = loss(clips, masks, num_objects=torch.tensor(4.0))
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = [[prediction(s.low_res[rows], s.ious[rows], s.object_score[rows]) for s in steps] for steps in clips]
        parts.append(loss(part, masks[:, rows], num_objects=torch.tensor(4.0)))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_full_resolution_logits_replace_the_upsampled_ones():
    clips, masks = random_batch(frames=2, candidates=(1,))
    clips, masks = clips[:1], masks[:1]
    full = torch.where(masks[0], 10.0, -10.0)[:, None].double()
    clips[0][0].full_res = full
    losses = SegmentationLoss(LossConfig())(clips, masks, num_objects=1)
    assert losses["focal"] < 1e-8 and losses["dice"] < 1e-3
    want = (clips[0][0].ious - 1).abs().sum()
    torch.testing.assert_close(losses["iou"], want.detach())


def test_no_objects_is_a_zero_loss():
    clips, masks = random_batch(objects=2)
    clips = [[prediction(s.low_res[:0], s.ious[:0], s.object_score[:0]) for s in steps] for steps in clips]
    losses = SegmentationLoss(LossConfig(temporal=1.0))(clips, masks[:, :0], num_objects=1)
    assert all(value == 0 for value in losses.values())
    losses["total"].backward()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("value", [1e4, -1e4, -1024.0, 0.0])
@pytest.mark.parametrize("filled", [True, False])
def test_saturated_logits_give_finite_losses_and_gradients(gamma, value, filled):
    low_res = torch.full((1, 3, 4, 4), value).requires_grad_()
    step = prediction(low_res, torch.rand(1, 3).requires_grad_(), torch.full((1, 1), value).requires_grad_())
    masks = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    masks[..., :8, :] = True
    masks[..., 8:, :] = filled
    config = LossConfig(focal_gamma=gamma, object_score_gamma=gamma, temporal=1.0, focal_alpha=0.25)
    losses = SegmentationLoss(config)([[step], [step]], masks, num_objects=1)
    losses["total"].backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for leaf in (low_res, step.ious, step.object_score):
        assert torch.isfinite(leaf.grad).all()


def test_focal_loss_of_a_plane_that_is_called_absent():
    target = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    target[..., :3, :] = True
    loss = focal_loss(torch.full((1, 1, 10, 10), -1024.0), target, alpha=0.25, gamma=2.0)
    assert loss.item() == pytest.approx(0.3 * 0.25 * 1024)
    clips = [[prediction(torch.full((1, 1, 10, 10), -1024.0), torch.ones(1, 1), torch.full((1, 1), -1.0))]]
    losses = SegmentationLoss(LossConfig())(clips, target[None, :, 0], num_objects=1)
    assert losses["missed_focal"].item() == losses["focal"].item() == pytest.approx(76.8)


def test_dice_and_iou_of_empty_and_full_masks():
    empty, full = torch.zeros(1, 1, 8, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    high, low = torch.full((1, 1, 8, 8), 1e4), torch.full((1, 1, 8, 8), -1e4)
    assert mask_iou(low, empty).item() == 0 and mask_iou(high, full).item() == 1 and mask_iou(high, empty).item() == 0
    assert dice_loss(low, empty).item() == 0 and dice_loss(high, full).item() == 0
    assert dice_loss(high, empty).item() == pytest.approx(1 - 1 / 65)


def loop_temporal(probabilities, masks, motion_compensated):
    """Plain loop over frames and objects; ground truth to low resolution by averaging whole blocks."""
    total = 0.0
    frames, objects, height, width = masks.shape
    side = probabilities.shape[-1]
    block = height // side
    for t in range(1, frames):
        for n in range(objects):
            if not masks[t, n].any() or not masks[t - 1, n].any():
                continue
            square = 0.0
            for i in range(side):
                for j in range(side):
                    change = probabilities[t, n, i, j] - probabilities[t - 1, n, i, j]
                    if motion_compensated:
                        rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                        share = masks[:, n, rows, columns].double().mean((-2, -1))
                        change = change - (share[t] - share[t - 1])
                    square = square + change**2
            total = total + square / side**2
    return total


@pytest.mark.parametrize("motion_compensated", [False, True])
def test_temporal_consistency_equals_a_plain_loop(motion_compensated):
    clips, masks = random_batch(frames=4, candidates=(1, 3))
    logits = []
    for steps in clips:  # the candidate of highest predicted IoU after the last click
        best = [int(step_ious.argmax()) for step_ious in steps[-1].ious]
        logits.append(torch.stack([steps[-1].low_res[n, m] for n, m in enumerate(best)]))
    want = loop_temporal(torch.stack(logits).sigmoid(), masks, motion_compensated)
    config = LossConfig(focal=0, dice=0, iou=0, object_score=0, temporal=0.5, motion_compensated=motion_compensated)
    losses = SegmentationLoss(config)(clips, masks, num_objects=2)
    torch.testing.assert_close(losses["temporal"], want.detach() / 2)
    torch.testing.assert_close(losses["total"], want / 4)
    got_grads = torch.autograd.grad(losses["total"], leaves(clips), allow_unused=True)
    want_grads = torch.autograd.grad(want / 4, leaves(clips), allow_unused=True)
    for got, wanted in zip(got_grads, want_grads, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted)


def test_motion_compensation_forgives_true_motion():
    masks = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    for t in range(3):
        masks[t, 0, 4 * t : 4 * t + 4] = True
    logits = [torch.where(masks[t, :, ::4, ::4], 40.0, -40.0).double() for t in range(3)]
    present = torch.ones(3, 1, dtype=torch.bool)
    assert temporal_consistency(logits, masks, present).item() == pytest.approx(2 * 2 / 4)
    assert temporal_consistency(logits, masks, present, motion_compensated=True).item() == pytest.approx(0, abs=1e-12)


def test_objects_seen_in_one_frame_of_a_pair_have_no_temporal_loss():
    masks = torch.ones(3, 2, 8, 8, dtype=torch.bool)
    masks[1, 0] = False  # object 0 is never visible in two neighboring frames
    masks[:, 1] = False
    logits = [torch.randn(2, 2, 2) for _ in range(3)]
    assert temporal_consistency(logits, masks, masks.flatten(2).any(-1)).item() == 0


def test_single_frames_have_no_temporal_loss():
    clips, masks = random_batch(frames=2)
    losses = SegmentationLoss(LossConfig(temporal=1.0))(clips[:1], masks[:1], num_objects=1)
    assert losses["temporal"] == 0


def test_bfloat16_predictions_are_summed_in_float32():
    clips, masks = random_batch(dtype=torch.float32)
    loss = SegmentationLoss(LossConfig(temporal=1.0))
    for step in (step for steps in clips for step in steps):
        for name in ("low_res", "ious", "object_score"):
            setattr(step, name, getattr(step, name).detach().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(clips, masks, num_objects=3)
    for step in (step for steps in clips for step in steps):
        for name in ("low_res", "ious", "object_score"):
            setattr(step, name, getattr(step, name).float())
    want = loss(clips, masks, num_objects=3)
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert math.isclose(got[name].item(), value.item(), rel_tol=1e-6)


def test_no_value_is_read_on_the_host():
    clips, masks = random_batch(dtype=torch.float32)
    mode = FakeTensorMode()  # reading the value of its tensors raises
    fake = mode.from_tensor
    clips = [[prediction(fake(s.low_res), fake(s.ious), fake(s.object_score)) for s in steps] for steps in clips]
    masks, num_objects = fake(masks), fake(torch.tensor(3.0))
    loss = SegmentationLoss(LossConfig(temporal=1.0, motion_compensated=True))
    with mode:
        losses = loss(clips, masks, num_objects)
        losses["total"].backward()
        with pytest.raises(DataDependentOutputException):
            losses["total"].item()
