"""A simulated user on B clips: prompts, memory and corrections over the frames, as in the training of SAM 2.

Source: arXiv 2408.00714, section 4 (interactive training with up to 8 frames) and the official trainer. Everything is
differentiable across clicks and frames: gradients flow through the mask that a correction starts from and through the
memory, over the whole clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory_bank import FrameMemory
from .plan import RolloutPlan
from .prompts import Points, coarse_mask, sample_box, sample_click
from .recompute import recomputed
from .sam2 import SAM2, MaskOutput

if TYPE_CHECKING:
    from ..data.sample import Batch


@dataclass
class FrameOutput:
    """All predictions of one frame, N objects."""

    frame: int
    steps: list[MaskOutput]
    """The first prediction, then one after each correction click."""
    points: list[Points | None]
    """All points that each step saw, in pixels of the input."""
    constant: bool
    """The true mask was given and taken as output: losses of this frame are constants."""
    memory: FrameMemory


@dataclass
class RolloutOutput:
    """Predictions of a batch."""

    frames: list[FrameOutput]
    """One for each frame, ascending in time."""


def rollout(model: SAM2, batch: Batch, plan: RolloutPlan, keep_all_memories: bool = False) -> RolloutOutput:
    """Run all frames of a batch in the order of the plan.

    Args:
        keep_all_memories: encode also the memories that no later frame reads (those of the last frame, and of images).
    """
    num_frames = batch.num_frames
    assert plan.num_frames == num_frames, f"plan for {plan.num_frames} frames, batch of {num_frames}"
    images = model.encode_images(batch.frames.flatten(0, 1))  # B * T images
    memories: list[FrameMemory] = []
    outputs: dict[int, FrameOutput] = {}
    for position, frame in enumerate(plan.order):
        if len(batch.frames) == 1 and model.performance.shared_image_features:
            features = images.row(frame)
        else:
            features = images.select(batch.object_to_clip * num_frames + frame)
        truth = batch.masks[frame]
        initial = frame in plan.init_frames
        constant = initial and plan.mode == "mask"
        if constant:
            steps, points = [model.mask_as_output(features, truth[:, None])], [None]
        else:
            top = images.top.unflatten(0, (-1, num_frames))[:, frame]  # [B, 256, h, w]
            conditioned = model.condition_on_memory(
                top, memories, frame, num_frames, initial=initial, index=batch.object_to_clip
            )
            steps, points = _simulate_user(model, conditioned, features.high_res, truth, frame, plan)
        final = steps[-1]
        spatial = None
        unread = not set(plan.order[position + 1 :]) - set(plan.init_frames)
        if keep_all_memories or not (unread and model.performance.skip_unread):
            mask = final.best if final.full_res is None else final.full_res
            encode = model.encode_memory
            if model.recompute.memory:
                encode = recomputed(encode, model.recompute.selective, random=False)
            spatial = encode(features.top, mask, final.object_score)
        memory = FrameMemory(frame, spatial, final.pointer, plan.is_conditioning(frame))
        memories.append(memory)
        outputs[frame] = FrameOutput(frame, steps, points, constant, memory)
    return RolloutOutput([outputs[frame] for frame in range(num_frames)])


def _simulate_user(
    model: SAM2, conditioned: Tensor, high_res: tuple[Tensor, Tensor], truth: Tensor, frame: int, plan: RolloutPlan
) -> tuple[list[MaskOutput], list[Points | None]]:
    """First prediction of a frame and its corrections; `truth` is bool [N, S, S]."""
    predict = model.predict_masks
    if model.recompute.recomputes_decoder(plan.max_objects or len(truth)):
        predict = recomputed(predict, model.recompute.selective, random=False)
    points, mask_prompt = _first_prompt(truth, frame, plan)
    corrections = plan.corrections(frame)
    steps: list[MaskOutput] = []
    seen: list[Points | None] = []
    for number in range(1 + len(corrections)):
        if number > 0:
            # The previous logits are not detached: a correction is trained together with what it corrects.
            mask_prompt = steps[-1].best
        if plan.injected is not None:
            points = plan.injected[frame][number]
        elif number > 0:
            points = _add_click(points, truth, _seen_errors(mask_prompt, plan, frame, number - 1))
        multimask = model.wants_candidates(points, frame in plan.init_frames)
        if points is None and mask_prompt is None:  # nothing but the image says how many objects there are
            conditioned = conditioned.expand(len(truth), -1, -1, -1)
        steps.append(predict(conditioned, high_res, points, mask_prompt, multimask))
        seen.append(points)
    return steps, seen


def _first_prompt(truth: Tensor, frame: int, plan: RolloutPlan) -> tuple[Points | None, Tensor | None]:
    """Points and mask prompt of a frame before any correction; frames that are tracked have neither."""
    if frame not in plan.init_frames or plan.injected is not None:
        return None, None
    if plan.mode == "coarse_mask":
        return None, coarse_mask(truth, plan.box_noise, plan.box_noise_bound)
    if plan.box[plan.init_frames.index(frame)]:
        return sample_box(truth, plan.box_noise, plan.box_noise_bound), None
    return sample_click(truth, None, plan.first_click), None


def _seen_errors(logits: Tensor, plan: RolloutPlan, frame: int, number: int) -> Tensor | None:
    """The prediction that a correction looks at: none, or one that is nowhere above 0, where it ignores the errors."""
    if plan.on_object is None:
        return None if plan.corrections(frame)[number] else logits
    return logits.detach().masked_fill(plan.on_object[plan.correct_frames.index(frame), number], 0.0)


@torch.no_grad()
def _add_click(points: Points | None, truth: Tensor, logits: Tensor | None) -> Points:
    """Append a click on the errors of the predicted logits [N, 1, h, w] (None: on the object) to the points."""
    click = sample_click(truth, logits)
    if points is None:
        return click
    return torch.cat([points[0], click[0]], dim=1), torch.cat([points[1], click[1]], dim=1)
