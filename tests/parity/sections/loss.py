"""Losses and their gradients in every option variant of the reference values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sam2fast.config import LossConfig
from sam2fast.losses import SegmentationLoss, dice_loss, focal_loss, mask_iou
from sections import Entry, Floor, OracleError, Report

LOSS = Floor(relative=3e-7)
IOU = Floor(absolute=1.5e-7)
LOGIT_GRADIENT = Floor(absolute=1e-9, relative=3e-7)
"""A single logit's gradient is at most 3e-3, the sum of focal and dice parts of either sign."""
OUTPUT_GRADIENT = Floor(absolute=1e-8, relative=3e-7)
"""float32 resolves 1 - sigmoid to 6e-8, here divided by the number of objects."""

OFFICIAL_NAMES = {
    "focal": "loss_mask",
    "dice": "loss_dice",
    "iou": "loss_iou",
    "object_score": "loss_class",
    "total": "core_loss",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "mse_iou": {"iou_l1": False},
    "best_iou_only": {"supervise_all_iou": False},
    "no_obj": {},  # a model without object score
    "obj_focal": {"object_score_gamma": 2.0, "object_score_alpha": 0.25},
    "alpha_off": {"focal_alpha": -1.0},
    "gamma1": {"focal_gamma": 1.0},
    "w_mask5_dice2": {"focal": 5.0, "dice": 2.0, "iou": 0.5, "object_score": 0.1},
}


@dataclass
class Prediction:
    """Recorded output of one click, as leaves of a graph."""

    low_res: Tensor
    ious: Tensor
    object_score: Tensor | None
    full_res: None = None


def check(data: Entry, report: Report) -> None:
    for case, want in data.items():
        if case not in ("inputs", "per_mask"):
            for fused in (True, False):
                _check_variant(case, data["inputs"], want, fused, report.at(case=case if fused else f"{case} plain"))
    inputs, want = data["inputs"], data["per_mask"]
    logits, target = inputs["logits"][0][0], inputs["masks"][0].unsqueeze(1)
    report = report.at(case="per_mask")
    report.compare("focal", focal_loss(logits, target, alpha=0.25, gamma=2.0), want["focal"], LOSS)
    report.compare("dice", dice_loss(logits, target), want["dice"], LOSS)
    report.compare("iou_l1", (inputs["ious"][0][0] - mask_iou(logits, target)).abs(), want["iou_l1"], IOU)


def _check_variant(case: str, inputs: Entry, want: Entry, fused: bool, report: Report) -> None:
    if case not in VARIANTS:
        raise OracleError(f"{want.path}: unknown loss variant; known: {', '.join(VARIANTS)}")
    frames = _predictions(inputs, with_score=case != "no_obj")
    masks = inputs["masks"]
    losses = SegmentationLoss(LossConfig(**VARIANTS[case], fused=fused))(
        frames, masks, num_objects=max(1, masks.shape[1])
    )
    losses["total"].backward()

    for ours, official in OFFICIAL_NAMES.items():
        report.compare(official, losses[ours], want[official], LOSS)
    norms = [[step.low_res.grad.flatten(2).norm(dim=-1) for step in steps] for steps in frames]
    report.compare("grad_logits_l2", norms, want["grad_logits_l2"], LOSS)
    report.compare(
        "grad_ious", [[step.ious.grad for step in steps] for steps in frames], want["grad_ious"], OUTPUT_GRADIENT
    )
    if case != "no_obj":
        scores = [[step.object_score.grad for step in steps] for steps in frames]
        report.compare("grad_obj", scores, want["grad_obj"], OUTPUT_GRADIENT)
    if "grad_logits" in want:
        logits = [[step.low_res.grad for step in steps] for steps in frames]
        report.compare("grad_logits", logits, want["grad_logits"], LOGIT_GRADIENT)


def _predictions(inputs: Entry, with_score: bool) -> list[list[Prediction]]:
    def leaf(name: str, t: int, step: int) -> Tensor:
        return inputs[name][t][step].clone().requires_grad_()

    return [
        [
            Prediction(leaf("logits", t, step), leaf("ious", t, step), leaf("obj", t, step) if with_score else None)
            for step in range(len(steps))
        ]
        for t, steps in enumerate(inputs["logits"])
    ]
