"""Whole training steps: rollout, loss, gradients and one AdamW update of a micro model with recorded clicks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from det_weights import det_images, det_tensor
from torch import Tensor

from sam2fast.config import LossConfig
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models.architecture import architecture
from sam2fast.models.official import from_official, named_official_parameters, to_official
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.rollout import RolloutOutput, rollout
from sam2fast.models.sam2 import SAM2
from sam2fast.optim import build_groups, learning_rate
from sam2fast.performance import PerformanceConfig
from sections import TOLERANCE, Entry, Floor, OracleError, Report

from .groups import MOSE

LOSS = 3e-7
GRADIENT = 1e-4
# Where nothing is stated with the file: the largest difference between runs of the official code on one CPU thread with
# oneDNN and on two without, over cases of other lengths, sizes and prompts.
FRAME_FLOORS = {
    "low_res": Floor(absolute=1e-5),
    "ious": Floor(absolute=1.5e-7),
    "obj": Floor(absolute=1e-6),
    "obj_ptr": Floor(absolute=1e-6),
    "maskmem": Floor(absolute=2e-5),
    "pred_masks_high_res_stats": Floor(absolute=1e-6),
}
FEATURES = Floor(absolute=2e-6)
UPDATE = Floor(relative=3e-4)
"""The first AdamW step divides each gradient by itself, so noise on small gradients counts fully."""

SAM_2_0_FLAGS = (
    "no_obj_embed_spatial",
    "add_tpos_enc_to_obj_ptrs",
    "proj_tpos_enc_in_obj_ptrs",
    "use_signed_tpos_enc_to_obj_ptrs",
)
LOSS_NAMES = {
    "focal": "loss_mask",
    "dice": "loss_dice",
    "iou": "loss_iou",
    "object_score": "loss_class",
    "total": "core_loss",
}


def check(data: Entry, report: Report) -> None:
    """Run every case with all optimizations on and off, and compare all that is recorded of it."""
    for name, case in data.items():
        compare(case, simulate(case), report.at(case=name))
        compare(case, simulate(case, optimized=False), report.at(case=f"{name}, off"))


def simulate(case: Entry, optimized: bool = True) -> dict[str, Any]:
    """Our values of a case, in the structure of the file."""
    model = build_model(case, PerformanceConfig() if optimized else PerformanceConfig.all_off())
    batch = build_batch(case)
    memory_log: list[list] = []

    def log(_: torch.nn.Module, inputs: tuple) -> None:
        _, memory, _, num_pointer_tokens, *_ = inputs
        memory_log.append([[memory.shape[1], memory.shape[0], memory.shape[2]], num_pointer_tokens])

    handle = model.memory_attention.register_forward_pre_hook(log)
    with torch.no_grad():
        features = model.encode_images(batch.frames.flatten(0, 1))
    output = rollout(model, batch, build_plan(case), keep_all_memories=True)
    handle.remove()
    losses = SegmentationLoss(LossConfig(fused=optimized))(
        [f.steps for f in output.frames], batch.masks, batch.num_objects
    )
    losses["total"].backward()
    return {
        "image_checksum": [batch.frames.double().sum(), batch.frames.double().abs().sum()],
        "cond_frames": sorted(f.frame for f in output.frames if f.memory.conditioning),
        "memory_log": memory_log,
        "losses": {official: losses[ours] for ours, official in LOSS_NAMES.items()},
        "fpn": {f"level{i}": _statistics(level) for i, level in enumerate((*features.high_res, features.top))},
        "fpn_top": features.top[0, : case["fpn_top"].shape[0]],
        "frames": _frame_values(output),
        **_update(model, case["adamw_where"]),
    }


def compare(case: Entry, ours: Mapping[str, Any], report: Report) -> None:
    """Enter all comparisons of a case."""
    checksum = case["image_checksum"]
    report.compare("image_checksum", ours["image_checksum"], checksum, Floor(absolute=1e-9 * checksum[1]))
    for name in ("cond_frames", "memory_log"):
        report.equal(name, ours[name], case[name])
    jumps = _iou_jumps(case, ours["frames"])
    for name, value in ours["losses"].items():
        absolute = jumps / TOLERANCE if name in ("loss_iou", "core_loss") else 0.0
        report.compare(name, value, case["losses"][name], Floor(absolute, LOSS))
    for name in ("fpn", "fpn_top"):
        report.compare(name, ours[name], case[name], FEATURES)
    for name, floor in FRAME_FLOORS.items():
        theirs = [frame[name] for frame in case["frames"]]
        report.compare(name, [frame[name] for frame in ours["frames"]], theirs, floor)
    total = case["total_grad_norm"]
    report.compare("total_grad_norm", ours["total_grad_norm"], total, Floor(relative=GRADIENT))
    # A norm far below that of the whole gradient carries the rounding errors of larger terms that cancel.
    floor = Floor(1e-9 * total, GRADIENT)
    report.compare("grad_norms", ours["grad_norms"], case["grad_norms"], floor)
    report.equal("unused_params", set(ours["unused_params"]), set(case["unused_params"]))
    # The true gradient of the bias of attention keys is 0: what AdamW makes of it is noise.
    deltas, reference = (
        {name: value for name, value in values["delta_norms"].items() if not name.endswith("k_proj.bias")}
        for values in (ours, case)
    )
    report.compare("delta_norms", deltas, reference, UPDATE)


def build_model(case: Entry, performance: PerformanceConfig) -> SAM2:
    """Micro model of a case in training mode, with the weights that its seed and the parameter names define."""
    flags = case["over"]
    if flags and {name: False for name in SAM_2_0_FLAGS} != flags:
        raise OracleError(f"{case.path}/over: expected nothing or {', '.join(SAM_2_0_FLAGS)}, all False; got {flags}")
    version = "2.0" if flags else "2.1"
    arch = architecture("micro", version, image_size=case["S"], drop_path=0.0, memory_dropout=0.0)
    model = SAM2(arch, performance=performance)
    shapes = {name: value.shape for name, value in to_official(model.state_dict()).items()}
    state = {name: det_tensor(name, shape, case["seed"]) for name, shape in shapes.items()}
    state["sam_mask_decoder.pred_obj_score_head.layers.2.bias"].fill_(case["obj_bias"])
    model.load_state_dict(from_official(state))
    return model.train()


def build_batch(case: Entry) -> Batch:
    """Frames and masks of a case."""
    num_frames, num_clips, size, clips = case["T"], case["B"], case["S"], case["vid"]
    masks = case["masks"]
    if masks.dtype != torch.bool or masks.shape != (num_frames, len(clips), size, size):
        raise OracleError(f"{case.path}/masks: expected bool [T, N, S, S], got {masks.dtype} {tuple(masks.shape)}")
    frames = det_images(num_frames, num_clips, size, case["seed"]).transpose(0, 1)
    return Batch(frames, masks, torch.tensor(clips), [str(clip) for clip in range(num_clips)])


def build_plan(case: Entry) -> RolloutPlan:
    """Plan of a case, with the recorded clicks."""
    frames, corrected = case["frames"], case["frames_to_add_correction_pt"]
    if len(frames) != case["T"]:
        raise OracleError(f"{case.path}/frames: expected T = {case['T']} frames, got {len(frames)}")
    points = {
        t: [None if point is None else (point["coords"], point["labels"]) for point in frame["points"]]
        for t, frame in enumerate(frames)
    }
    init = tuple(case["init_cond_frames"])
    order = init + tuple(t for t in range(len(frames)) if t not in init)
    correct = tuple(t for t in order if t in corrected)
    return RolloutPlan(
        num_frames=len(frames),
        mode="point" if case["use_pt_input"] else "mask",
        init_frames=init,
        correct_frames=correct,
        click_from_gt=tuple((False,) * (len(points[t]) - 1) for t in correct),
        injected=points,
    )


def _frame_values(output: RolloutOutput) -> list[dict[str, Any]]:
    values = []
    for frame in output.frames:
        final = frame.steps[-1]
        full = _upsample(final.best) if final.full_res is None else final.full_res
        values.append({
            "low_res": [step.low_res for step in frame.steps],
            "ious": [step.ious for step in frame.steps],
            "obj": [step.object_score for step in frame.steps],
            "obj_ptr": frame.memory.pointer,
            "maskmem": frame.memory.spatial,
            "pred_masks_high_res_stats": [full.double().mean(), full.double().std()],
        })  # fmt: skip
    return values


def _iou_jumps(case: Entry, frames: list[dict[str, Any]]) -> float:
    """How much the IoU loss may differ because logits fell on different sides of 0.

    The true IoU counts pixels with positive logits, so noise on a logit near 0 moves it by a whole pixel.
    """
    total, masks = 0.0, case["masks"]
    for t, frame in enumerate(case["frames"]):
        for ours, theirs in zip(frames[t]["low_res"], frame["low_res"], strict=False):
            if ours.shape == theirs.shape:
                first, second = (_upsample(logits) > 0 for logits in (ours.detach(), theirs))
                union = (second | masks[t][:, None]).sum((-2, -1)).clamp(min=1)
                total += ((first != second).sum((-2, -1)) / union).mean(1).sum().item()
    return total / masks.shape[1]


def _upsample(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)


def _statistics(values: Tensor) -> list[Tensor]:
    values = values.double()
    return [values.mean(), values.abs().mean(), values.std()]


def _update(model: SAM2, where: float) -> dict[str, Any]:
    """Gradient norms by official name, and what one AdamW step at schedule position `where` changes."""
    named = dict(named_official_parameters(model))
    gradients = {name: p.grad.norm() for name, p in named.items() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in named.items()}
    groups = build_groups(model, MOSE)
    scale = learning_rate(MOSE, where, total_steps=1)
    for group in groups:
        group["lr"] = group["base_lr"] * scale
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), MOSE.clip)
    torch.optim.AdamW([{k: group[k] for k in ("params", "lr", "weight_decay")} for group in groups]).step()
    return {
        "grad_norms": gradients,
        "unused_params": [name for name in named if name not in gradients],
        "total_grad_norm": total,
        "delta_norms": {name: (p.detach() - before[name]).norm() for name, p in named.items()},
    }
