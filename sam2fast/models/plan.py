"""What the simulated user of a training step will do: every random choice that shapes the graph, drawn beforehand.

A plan depends on the configuration, the number of frames and one generator alone, never on the data. With the same
generator state on all ranks the graphs are equal, which sharded training needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from ..config import PromptConfig
from .prompts import Points


@dataclass(frozen=True)
class RolloutPlan:
    """Prompts and corrections of one batch, shared by its objects, clips and all ranks."""

    num_frames: int
    mode: Literal["mask", "point", "coarse_mask"]
    """mask: the true masks of the initial frames are given and taken as output. point: a click or a box, then
    correction clicks. coarse_mask: a distorted mask goes to the prompt encoder, then correction clicks."""
    init_frames: tuple[int, ...]
    """Frames that are prompted before any tracking, in the order in which they are run; the first is frame 0."""
    correct_frames: tuple[int, ...] = ()
    """Frames that get correction clicks, in the order in which they are run."""
    box: tuple[bool, ...] = ()
    """Point mode: whether each initial frame is prompted with a box (else with a click)."""
    click_from_gt: tuple[tuple[bool, ...], ...] = ()
    """For each corrected frame and correction, whether the click falls on the object wherever the errors are."""
    first_click: Literal["uniform", "center"] = "uniform"
    box_noise: float = 0.1
    box_noise_bound: float = 20.0
    corrected_as_conditioning: bool = True
    max_objects: int | None = None
    """Most objects that the batch of any rank can have, where ranks must agree on what is computed again; None: those
    of the batch at hand."""
    injected: Mapping[int, Sequence[Points | None]] | None = field(default=None, compare=False, repr=False)
    """Recorded points: for each frame, all points that each run of the mask decoder sees; nothing is sampled then."""
    on_object: Tensor | None = field(default=None, compare=False, repr=False)
    """`click_from_gt` as bool [frames, clicks] on the device, read there instead of it: see `kind`."""

    @property
    def order(self) -> tuple[int, ...]:
        """Frames in the order in which they are run: the initial ones, then the others by time."""
        return self.init_frames + tuple(t for t in range(self.num_frames) if t not in self.init_frames)

    @property
    def clicks(self) -> int:
        """Correction clicks of each corrected frame."""
        return max(map(len, self.click_from_gt), default=0)

    @property
    def kind(self) -> RolloutPlan:
        """What shapes the graph: all of the plan but the values of `click_from_gt`, which may come as a tensor."""
        return replace(self, click_from_gt=tuple((False,) * len(clicks) for clicks in self.click_from_gt))

    def corrections(self, frame: int) -> tuple[bool, ...]:
        """The corrections of a frame: for each, whether its click ignores the errors (see `click_from_gt`)."""
        return self.click_from_gt[self.correct_frames.index(frame)] if frame in self.correct_frames else ()

    def is_conditioning(self, frame: int) -> bool:
        """Whether the memory of this frame counts as prompted, so that every later frame attends to it."""
        return frame in self.init_frames or (self.corrected_as_conditioning and frame in self.correct_frames)


def draw_plan(config: PromptConfig, num_frames: int, rng: np.random.Generator) -> RolloutPlan:
    """Draw the plan of one step: the distribution (and for its options the random stream) of the official trainer.

    A video takes masks or points (`config.video`); the number of initial and of corrected frames is uniform up to its
    maximum; frame 0 is the first initial frame and the first corrected one, the others are drawn without replacement.
    Masks are not corrected. An image takes points, or a coarse mask (`config.image`), and is corrected. Maxima above
    the number of frames are cut to it.
    """
    assert num_frames >= 1, num_frames
    mix = config.video if num_frames > 1 else config.image
    if rng.random() < 1 - mix.mask:
        mode = "point"
    else:
        mode = "mask" if num_frames > 1 else "coarse_mask"
    num_init, num_correct = _draw_counts(config, num_frames, mode, rng)
    init_frames = (0,)
    if num_init > 1:
        init_frames += tuple(rng.choice(range(1, num_frames), num_init - 1, replace=False).tolist())
    box: tuple[bool, ...] = ()
    if mode == "point":
        box = tuple(bool(rng.random() < mix.box / (mix.click + mix.box)) for _ in init_frames)
    correct_frames = init_frames[:num_correct]
    if num_correct > num_init:
        others = [t for t in range(num_frames) if t not in init_frames]
        correct_frames += tuple(sorted(rng.choice(others, num_correct - num_init, replace=False).tolist()))
    return RolloutPlan(
        num_frames=num_frames,
        mode=mode,
        init_frames=init_frames,
        correct_frames=correct_frames,
        box=box,
        click_from_gt=tuple(_draw_clicks(config, rng) for _ in correct_frames),
        first_click=config.first_click,
        box_noise=config.box_noise,
        box_noise_bound=config.box_noise_bound,
        corrected_as_conditioning=config.corrected_as_conditioning,
    )


def _draw_counts(config: PromptConfig, num_frames: int, mode: str, rng: np.random.Generator) -> tuple[int, int]:
    """How many frames are prompted at the start, and how many are corrected."""
    num_init = min(config.init_frames, num_frames)
    if config.random_init_frames and num_init > 1:
        num_init = int(rng.integers(1, num_init, endpoint=True))
    if mode == "mask" or config.correction_clicks == 0:
        return num_init, 0
    num_correct = min(config.corrected_frames, num_frames)
    if config.random_corrected_frames and num_correct > num_init:
        num_correct = int(rng.integers(num_init, num_correct, endpoint=True))
    return num_init, num_correct


def _draw_clicks(config: PromptConfig, rng: np.random.Generator) -> tuple[bool, ...]:
    share = config.click_from_ground_truth
    return tuple(bool(share > 0 and rng.random() < share) for _ in range(config.correction_clicks))
