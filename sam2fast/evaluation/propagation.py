"""Tracking of prompted objects through a video by the inference rules of the official SAM 2 predictor.

Frames are read one by one, each is encoded once for all objects, and memories that no later frame can reach are
dropped: memory use does not grow with the length of the video.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError
from ..models.memory_bank import FrameMemory
from ..models.prompts import Points
from ..models.sam2 import SAM2, ImageFeatures, MaskOutput


class PromptError(UserError):
    """Prompts that do not fit the video; the message says which, the value seen and the remedy."""


@dataclass(frozen=True)
class PointPrompt:
    """Clicks or a box on one object."""

    coords: np.ndarray
    """[P, 2], (x, y) in pixels of the video."""
    labels: np.ndarray
    """[P]: 1 positive, 0 negative, 2 and 3 the top left and bottom right corner of a box, which comes first."""


Prompt = np.ndarray | Tensor | PointPrompt
"""A mask [H, W] (bool), or points."""


@torch.no_grad()  # not inference_mode: tables that the model caches here are used in training later
def propagate(
    model: SAM2,
    frames: Iterable[np.ndarray | Tensor],
    prompts: Mapping[int, tuple[int, Prompt]],
    num_frames: int,
    non_overlap: bool = False,
    memory_dtype: torch.dtype = torch.bfloat16,
    low_res_prompts: bool = True,
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Track objects through a video, each from the frame on which it is prompted.

    Args:
        model: in evaluation mode.
        frames: uint8 [H, W, 3] RGB each, read as they are needed.
        prompts: object id -> (frame number, mask or points). A mask is taken as the prediction of its frame.
        num_frames: length of the video; object pointers carry their distance as a share of it.
        non_overlap: give each pixel to the object of the highest logit only.
        memory_dtype: in which memories are kept; the official predictor rounds them to bfloat16.
        low_res_prompts: make the memory of a prompted mask from its quarter resolution, as the official predictor does;
            else from the mask itself, as in training and in transformers.

    Yields:
        Frame number, and mask logits float32 [H, W] of every object prompted by then.

    Raises:
        PromptError: a prompt lies outside the video or does not have the size of its frames.
    """
    assert not model.training, "propagate needs model.eval()"
    _check_prompts(prompts, num_frames)
    tracks: list[_Track] = []
    index = -1
    for index, image in enumerate(frames):
        if index >= num_frames:
            raise PromptError(f"the video goes on after its {num_frames} frames; pass its true length as num_frames")
        size = tuple(image.shape[:2])
        new = {name: prompt for name, (start, prompt) in prompts.items() if start == index}
        tracks += _start_tracks(new, size, model)
        if not tracks:
            yield index, {}
            continue
        features = model.encode_images(_to_input(image, model))
        logits: dict[int, Tensor] = {}
        for track in tracks:
            low_res = track.step(features, index, num_frames, memory_dtype, low_res_prompts)
            full = F.interpolate(low_res.float(), size=size, mode="bilinear", align_corners=False)
            logits.update(zip(track.object_ids, full[:, 0], strict=True))
        yield index, suppress_overlap(logits) if non_overlap else logits
    last = max(start for start, _ in prompts.values())
    if index < last:
        raise PromptError(f"the video ended after {index + 1} frames, before the prompt on frame {last}")


def suppress_overlap(logits: dict[int, Tensor]) -> dict[int, Tensor]:
    """Keep each pixel of the object with the highest logit; the logits of the others there become at most -10."""
    stacked = torch.stack(list(logits.values()))
    winner = stacked.argmax(dim=0)
    return {
        name: torch.where(winner == i, values, values.clamp(max=-10.0))
        for i, (name, values) in enumerate(zip(logits, stacked, strict=True))
    }


@dataclass
class _Track:
    """Objects that were prompted on the same frame and in the same way: they run as one batch."""

    model: SAM2
    object_ids: list[int]
    masks: Tensor | None
    """Prompted masks bool [N, 1, S, S]."""
    points: Points | None
    """Prompted points in pixels of the input."""
    memories: list[FrameMemory] = field(default_factory=list)

    def step(
        self, image: ImageFeatures, frame: int, num_frames: int, memory_dtype: torch.dtype, low_res_prompts: bool
    ) -> Tensor:
        """Logits [N, 1, S/4, S/4] of the next frame, whose features `image` has; adds its memory."""
        prompted = not self.memories
        features = image.select(torch.zeros(len(self.object_ids), dtype=torch.long, device=image.top.device))
        output = self._predict(features, frame, num_frames, prompted)
        spatial = None
        if frame + 1 < num_frames:
            mask = output.best if output.full_res is None or low_res_prompts else output.full_res
            # What the user has drawn or approved is remembered as it was shown: thresholded.
            spatial = self.model.encode_memory(features.top, mask, output.object_score, binarize=prompted)
            spatial = spatial.to(memory_dtype)
        self.memories.append(FrameMemory(frame, spatial, output.pointer, conditioning=prompted))
        self._forget(frame, num_frames)
        return output.best

    def _predict(self, features: ImageFeatures, frame: int, num_frames: int, prompted: bool) -> MaskOutput:
        if prompted and self.masks is not None:
            return self.model.mask_as_output(features, self.masks)
        conditioned = self.model.condition_on_memory(features.top, self.memories, frame, num_frames, initial=prompted)
        points = self.points if prompted else None
        multimask = self.model.wants_candidates(points, initial=prompted)
        # The rule for unstable masks falls back to the candidates, which nobody trained on tracked frames if tracking
        # has one.
        stable = prompted or self.model.arch.multimask_tracking
        return self.model.predict_masks(conditioned, features.high_res, points, None, multimask, stable=stable)

    def _forget(self, frame: int, num_frames: int) -> None:
        """Drop what no frame after `frame` can attend to: old memories, then also their pointers."""
        arch = self.model.arch
        first_spatial = frame + 1 - (arch.num_memories - 1)
        first_pointer = frame + 1 - (min(num_frames, arch.max_pointers) - 1)
        self.memories = [
            memory if memory.conditioning or memory.frame >= first_spatial else replace(memory, spatial=None)
            for memory in self.memories
            if memory.conditioning or memory.frame >= min(first_spatial, first_pointer)
        ]


def _check_prompts(prompts: Mapping[int, tuple[int, Prompt]], num_frames: int) -> None:
    if not prompts:
        raise PromptError("no object to track; pass at least one prompt")
    for name, (start, prompt) in prompts.items():
        if not 0 <= start < num_frames:
            raise PromptError(f"the prompt of object {name} is on frame {start}; the video has 0 to {num_frames - 1}")
        if isinstance(prompt, PointPrompt) and np.shape(prompt.coords) != (len(prompt.labels), 2):
            raise PromptError(
                f"object {name}: {len(prompt.labels)} labels need [P, 2] coordinates, not those of shape "
                f"{np.shape(prompt.coords)}"
            )


def _start_tracks(prompts: Mapping[int, Prompt], size: tuple[int, int], model: SAM2) -> list[_Track]:
    """Group the objects that are prompted on one frame of `size` (H, W): all masks, and all of P points."""
    groups: dict[int | None, dict[int, Prompt]] = {}
    for name, prompt in prompts.items():
        kind = len(prompt.labels) if isinstance(prompt, PointPrompt) else None
        if kind is None and tuple(prompt.shape) != size:
            raise PromptError(f"the mask of object {name} has shape {tuple(prompt.shape)}, its frame {size}; resize it")
        groups.setdefault(kind, {})[name] = prompt
    tracks = []
    for kind, group in groups.items():
        masks = _to_masks(list(group.values()), model) if kind is None else None
        points = None if kind is None else _to_points(list(group.values()), size, model)
        tracks.append(_Track(model, list(group), masks, points))
    return tracks


def _device(model: SAM2) -> torch.device:
    return next(model.parameters()).device


def _to_input(image: np.ndarray | Tensor, model: SAM2) -> Tensor:
    """Frame uint8 [H, W, 3] as input uint8 [1, 3, S, S] on the device of the model."""
    pixels = torch.as_tensor(image).to(_device(model)).permute(2, 0, 1)[None]
    side = model.arch.image_size
    if pixels.shape[-2:] == (side, side):
        return pixels
    resized = F.interpolate(pixels.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _to_masks(masks: list[Prompt], model: SAM2) -> Tensor:
    """Masks [H, W] as bool [N, 1, S, S]."""
    stacked = torch.stack([torch.as_tensor(mask) for mask in masks])[:, None].to(_device(model))
    side = model.arch.image_size
    if stacked.shape[-2:] == (side, side):
        return stacked > 0
    resized = F.interpolate((stacked > 0).float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized >= 0.5


def _to_points(prompts: list[PointPrompt], size: tuple[int, int], model: SAM2) -> Points:
    """Points on a frame of `size` (H, W) as coordinates [N, P, 2] in pixels of the input and labels [N, P]."""
    device, side = _device(model), model.arch.image_size
    scale = np.array([side / size[1], side / size[0]])
    coords = np.stack([np.asarray(prompt.coords) * scale for prompt in prompts])
    labels = np.stack([np.asarray(prompt.labels) for prompt in prompts])
    return torch.from_numpy(coords).float().to(device), torch.from_numpy(labels).int().to(device)
