"""Losses of SAM 2 training: focal, dice, IoU and object score (arXiv 2408.00714, section D.2) and temporal consistency.

Every loss is a sum over objects, clicks and frames, divided by the number of objects that one optimizer step sees per
rank. Logits stay at the resolution of the mask decoder until a term needs them at that of the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam2fast_kernels.mask_loss import mask_loss, sampled_mask_loss

from .config import LossConfig


class MaskPrediction(Protocol):
    """What the losses read of one run of the mask decoder, for N objects with M candidate masks each."""

    low_res: Tensor
    """Mask logits [N, M, h, w]."""
    ious: Tensor
    """Predicted IoU [N, M]."""
    object_score: Tensor | None
    """Logits of presence [N, 1]; None for a model without them, whose objects all count as present."""
    full_res: Tensor | None
    """Mask logits at the resolution of the ground truth [N, 1, H, W], where they are not an upsampled `low_res`."""


class SegmentationLoss(nn.Module):
    """All losses of one batch."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, frames: Sequence[Sequence[MaskPrediction]], masks: Tensor, num_objects: float | Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch of clips.

        Of several candidate masks only the one with the lowest weighted focal + dice loss is trained (arXiv 2304.02643,
        section 3). Objects that are absent from a frame train nothing there but the object score.

        Args:
            frames: of each of the T frames, the predictions of all its clicks.
            masks: ground truth, bool [T, N, H, W]; empty where an object is absent.
            num_objects: divisor of all terms, at least 1: objects of the whole optimizer step (all ranks, all
                micro-steps) over the number of ranks.

        Returns:
            Scalars: the unweighted `focal`, `dice`, `iou`, `object_score` and `temporal`; `missed_focal`, the part of
            `focal` on present objects that the object score calls absent (their masks are a constant, so this part has
            no gradient and explains jumps of the loss); `mask`, the weighted focal + dice + iou; and `total`, the
            weighted sum of all. Only `total` carries gradients.
        """
        assert len(frames) == len(masks), f"predictions of {len(frames)} frames, ground truth of {len(masks)}"
        present = masks.flatten(2).any(-1)  # [T, N]
        names = ("focal", "dice", "iou", "object_score", "missed_focal", "temporal")
        terms = dict.fromkeys(names, masks.new_zeros((), dtype=torch.float32))
        for predictions, target, visible in zip(frames, masks, present, strict=True):
            for prediction in predictions:
                for name, value in self._prediction_terms(prediction, target, visible).items():
                    terms[name] = terms[name] + value
        if self.config.temporal > 0:
            logits = [_most_confident(predictions[-1]) for predictions in frames]
            terms["temporal"] = temporal_consistency(logits, masks, present, self.config.motion_compensated)
        terms = {name: value / num_objects for name, value in terms.items()}
        total = self._weighted(terms, ("focal", "dice", "iou", "object_score", "temporal"))
        terms["mask"] = self._weighted(terms, ("focal", "dice", "iou"))
        return {name: value.detach() for name, value in terms.items()} | {"total": total}

    def _prediction_terms(self, prediction: MaskPrediction, target: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """Terms of one click, summed over objects; `target` is bool [N, H, W] and `visible` bool [N]."""
        config = self.config
        focal, dice, iou = self._candidate_terms(prediction, target)  # [N, M]
        chosen = (config.focal * focal + config.dice * dice).detach().argmin(1, keepdim=True)
        focal, dice = focal.gather(1, chosen).squeeze(1), dice.gather(1, chosen).squeeze(1)  # [N]
        iou = (iou if config.supervise_all_iou else iou.gather(1, chosen)).mean(1)
        if prediction.object_score is None:
            return {"focal": focal.sum(), "dice": dice.sum(), "iou": iou.sum()}
        score = _at_least_float32(prediction.object_score).squeeze(1)  # [N]
        score_loss = _focal_elements(score, visible, config.object_score_alpha, config.object_score_gamma)
        return {
            "focal": (focal * visible).sum(),
            "dice": (dice * visible).sum(),
            "iou": (iou * visible).sum(),
            "object_score": score_loss.sum(),
            "missed_focal": (focal.detach() * (visible & (score <= 0))).sum(),
        }

    def _candidate_terms(self, prediction: MaskPrediction, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Focal, dice and IoU loss of every candidate, [N, M]; `target` is bool [N, H, W]."""
        config = self.config
        logits = prediction.low_res if prediction.full_res is None else prediction.full_res
        if config.fused or config.sampled_points:
            options = {
                "gamma": config.focal_gamma,
                "alpha": config.focal_alpha if config.focal_alpha >= 0 else None,
                "iou_loss": "l1" if config.iou_l1 else "mse",
            }
            if config.sampled_points:
                losses = sampled_mask_loss(logits, target, prediction.ious, config.sampled_points, **options)
            else:
                losses = mask_loss(logits, target, prediction.ious, **options)
            return losses.focal, losses.dice, losses.iou_loss
        target = target.unsqueeze(1)
        logits = _upsample(_at_least_float32(logits), target)  # [N, M, H, W]
        iou_error = _at_least_float32(prediction.ious) - mask_iou(logits, target)
        return (
            focal_loss(logits, target, config.focal_alpha, config.focal_gamma),
            dice_loss(logits, target),
            iou_error.abs() if config.iou_l1 else iou_error.square(),
        )

    def _weighted(self, terms: dict[str, Tensor], names: Sequence[str]) -> Tensor:
        weights = {name: getattr(self.config, name) for name in names}
        # A term that is switched off must not reach the sum: 0 * inf is NaN.
        weighted = [weight * terms[name] for name, weight in weights.items() if weight > 0]
        return torch.stack(weighted).sum() if weighted else torch.zeros_like(terms["focal"])


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002, eq. 5), mean over pixels: [N, M, H, W] and bool [N, 1, H, W] give [N, M].

    An `alpha` below 0 turns the class balance off.
    """
    return _focal_elements(logits, targets, alpha, gamma).mean((-2, -1))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 sum(p g) + 1) / (sum(p) + sum(g) + 1) over pixels: [N, M, H, W] and bool [N, 1, H, W] give [N, M]."""
    probabilities = logits.sigmoid()
    overlap = (probabilities * targets).sum((-2, -1))
    areas = probabilities.sum((-2, -1)) + targets.sum((-2, -1))
    return 1 - (2 * overlap + 1) / (areas + 1)


def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of the binarized masks, 0 where both are empty: [N, M, H, W] and bool [N, 1, H, W] give [N, M]."""
    predicted = logits > 0
    intersection = (predicted & targets).sum((-2, -1))
    union = (predicted | targets).sum((-2, -1))
    return intersection.to(logits.dtype) / union.clamp(min=1)


def temporal_consistency(
    logits: Sequence[Tensor], masks: Tensor, present: Tensor, motion_compensated: bool = False
) -> Tensor:
    """Change of the mask probabilities p between neighboring frames, where an object is visible in both.

    Sum over frames and objects of the mean over pixels of (p_t - p_(t-1))^2, or, with `motion_compensated`, of
    ((p_t - p_(t-1)) - (g_t - g_(t-1)))^2, g the ground truth, which leaves true motion unpunished.

    Args:
        logits: of each of the T frames, [N, h, w].
        masks: ground truth, bool [T, N, H, W]; brought to h x w by area.
        present: bool [T, N], the objects that are visible.
    """
    total = logits[0].new_zeros(())
    previous: Tensor | None = None
    for t, frame_logits in enumerate(logits):
        current = frame_logits.sigmoid()
        if motion_compensated:
            target = masks[t].to(current.dtype).unsqueeze(1)
            current = current - F.interpolate(target, current.shape[-2:], mode="area").squeeze(1)
        if previous is not None:
            change = (current - previous).square().mean((-2, -1))  # [N]
            total = total + (change * (present[t] & present[t - 1])).sum()
        previous = current
    return total


def _focal_elements(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of each element.

    With z the logit of the true class, the loss is -log sigmoid(z) * sigmoid(-z)^gamma. The power is taken as an
    exponential of a logarithm, whose gradient is finite where sigmoid(-z) has underflowed to 0, for every gamma.
    """
    truth = targets.to(logits.dtype).expand_as(logits)
    # The rounding of this function is part of the reference values: 5e-7 on a confident, correct negative.
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if gamma > 0:
        loss = loss * torch.exp(gamma * F.logsigmoid(torch.where(targets, -logits, logits)))
    if alpha >= 0:
        loss = loss * (truth * (2 * alpha - 1) + (1 - alpha))
    return loss


def _most_confident(prediction: MaskPrediction) -> Tensor:
    """Low-resolution logits of the candidate of highest predicted IoU, [N, h, w]."""
    best = prediction.ious.argmax(1)[:, None, None, None]
    return _at_least_float32(torch.take_along_dim(prediction.low_res, best, 1).squeeze(1))


def _upsample(logits: Tensor, target: Tensor) -> Tensor:
    size = target.shape[-2:]
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
