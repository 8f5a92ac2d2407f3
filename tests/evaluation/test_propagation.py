"""Tracking by the inference rules of the official predictor, on a micro model with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sam2fast.data.sample import Batch
from sam2fast.evaluation import propagation
from sam2fast.evaluation.propagation import PointPrompt, PromptError, propagate
from sam2fast.models.architecture import architecture
from sam2fast.models.memory_bank import FrameMemory
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2

SIZE, NUM_FRAMES = 64, 20


@pytest.fixture(scope="module")
def model() -> SAM2:
    torch.manual_seed(0)
    model = SAM2(architecture("micro", image_size=SIZE)).eval()
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3)  # objects are present
    return model


def video(num_frames: int = NUM_FRAMES, height: int = SIZE, width: int = SIZE) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(num_frames)]


def box(top: int, left: int, bottom: int, right: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def track(model, frames, prompts, **options) -> dict[tuple[int, int], torch.Tensor]:
    """(object, frame) -> logits."""
    found = {}
    for number, (index, logits) in enumerate(propagate(model, iter(frames), prompts, len(frames), **options)):
        assert index == number
        found |= {(name, index): values for name, values in logits.items()}
    return found


def test_objects_are_tracked_from_their_prompt_at_the_size_of_the_video(model):
    masks = {5: box(10, 20, 60, 70, 80, 100), 2: box(30, 5, 70, 40, 80, 100)}
    found = track(model, video(5, 80, 100), {5: (0, masks[5]), 2: (3, masks[2])})
    assert sorted(found) == [(2, 3), (2, 4), (5, 0), (5, 1), (5, 2), (5, 3), (5, 4)]
    assert all(values.shape == (80, 100) and values.dtype == torch.float32 for values in found.values())
    for name, start in ((5, 0), (2, 3)):
        predicted, truth = found[name, start].numpy() > 0, masks[name]
        assert (predicted & truth).sum() / (predicted | truth).sum() > 0.93  # the prompt is the output of its frame
    assert found[5, 4].std() > 0


@torch.no_grad()
def test_objects_agree_with_a_plain_loop_that_keeps_everything(model):
    frames = video()
    clicks = PointPrompt(np.array([[20.0, 30.0], [50.0, 9.0]]), np.array([1, 0]))
    prompts = {1: (0, box(8, 8, 30, 40)), 2: (0, box(30, 20, 60, 50)), 3: (2, box(5, 30, 50, 60)), 4: (2, clicks)}
    found = track(model, frames, prompts, memory_dtype=torch.float32)
    for name, (start, prompt) in prompts.items():
        memories: list[FrameMemory] = []
        for t in range(start, NUM_FRAMES):
            features = model.encode_images(torch.from_numpy(frames[t]).permute(2, 0, 1)[None])
            first = t == start
            if first and name != 4:
                out = model.mask_as_output(features, torch.from_numpy(prompt)[None, None])
            else:
                top = model.condition_on_memory(features.top, memories, t, NUM_FRAMES, initial=first)
                points = None
                if first:
                    points = torch.tensor(clicks.coords).float()[None], torch.tensor(clicks.labels)[None]
                out = model.predict_masks(top, features.high_res, points, None, multimask=not first, stable=True)
            spatial = model.encode_memory(features.top, out.best, out.object_score, binarize=first)
            memories.append(FrameMemory(t, spatial, out.pointer, conditioning=first))
            expected = F.interpolate(out.best, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
            torch.testing.assert_close(found[name, t], expected, atol=1e-4, rtol=0)


def test_memory_is_bounded_and_what_is_dropped_is_never_read(model, monkeypatch):
    held = []
    condition = SAM2.condition_on_memory

    def spy(self, top, memories, *args, **kwargs):
        held.append((sum(m.spatial is not None for m in memories), len(memories)))
        return condition(self, top, memories, *args, **kwargs)

    monkeypatch.setattr(SAM2, "condition_on_memory", spy)
    frames, prompts = video(), {1: (0, box(8, 8, 30, 40))}
    bounded = track(model, frames, prompts)
    assert max(held) == (7, 16)  # the prompt and 6 frames; their pointers and 9 more
    monkeypatch.setattr(propagation._Track, "_forget", lambda *_: None)
    kept = track(model, frames, prompts)
    assert max(held)[1] == NUM_FRAMES - 1
    assert all(torch.equal(bounded[key], kept[key]) for key in kept)


def test_frames_are_read_when_needed_and_encoded_once(model, monkeypatch):
    read, encoded = [], []
    encode = SAM2.encode_images
    monkeypatch.setattr(SAM2, "encode_images", lambda self, x: encoded.append(x.shape) or encode(self, x))

    def frames():
        for index, frame in enumerate(video(6)):
            read.append(index)
            yield frame

    prompts = {1: (1, box(8, 8, 30, 40)), 2: (1, box(30, 20, 60, 50)), 3: (2, box(5, 30, 50, 60))}
    for index, logits in propagate(model, frames(), prompts, 6):
        assert read == list(range(index + 1))
        assert set(logits) == {name for name, (start, _) in prompts.items() if start <= index}
    assert encoded == [(1, 3, SIZE, SIZE)] * 5  # nothing is tracked on frame 0


def test_a_later_start_is_the_same_as_a_shorter_video(model):
    frames, mask = video(9), box(8, 8, 30, 40)
    late = track(model, frames, {1: (0, box(30, 20, 60, 50)), 2: (4, mask)})
    early = dict(enumerate(logits[2] for _, logits in propagate(model, frames[4:], {2: (0, mask)}, 9)))
    assert all(torch.allclose(late[2, 4 + t], early[t], atol=1e-4) for t in early) and len(early) == 5


def test_memories_are_rounded_to_bfloat16_by_default(model):
    frames, prompts = video(4), {1: (0, box(8, 8, 30, 40))}
    rounded, exact = (track(model, frames, prompts, **options) for options in ({}, {"memory_dtype": torch.float32}))
    difference = max((rounded[key] - exact[key]).abs().max() for key in exact)
    assert 0 < difference < 0.5


def test_points_are_scaled_to_the_input(model):
    clicked = PointPrompt(np.array([[20.0, 30.0]]), np.array([1]))
    boxed = PointPrompt(np.array([[10.0, 10.0], [40.0, 50.0]]), np.array([2, 3]))
    small = [np.ascontiguousarray(frame) for frame in video(2)]
    large = [frame.repeat(2, axis=0).repeat(3, axis=1) for frame in small]  # 128 x 192
    wide = PointPrompt(clicked.coords * [3, 2], clicked.labels)
    found = track(model, small, {1: (0, clicked), 2: (0, boxed)})
    scaled = track(model, large, {1: (0, wide)})
    resized = F.interpolate(scaled[1, 0][None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
    assert (found[1, 0] - resized).abs().mean() < 0.2 * found[1, 0].std()
    assert not torch.allclose(found[1, 0], found[2, 0])


def test_non_overlap_gives_each_pixel_to_one_object(model):
    frames = video(3)
    prompts = {1: (0, box(8, 8, 40, 40)), 2: (0, box(20, 20, 60, 60))}
    free, exclusive = (track(model, frames, prompts, non_overlap=flag) for flag in (False, True))
    assert ((free[1, 0] > 0) & (free[2, 0] > 0)).any()
    for t in range(3):
        assert not ((exclusive[1, t] > 0) & (exclusive[2, t] > 0)).any()
        assert torch.equal(torch.maximum(exclusive[1, t], exclusive[2, t]), torch.maximum(free[1, t], free[2, t]))


def test_the_model_trains_after_tracking(model):
    track(model, video(3), {1: (0, box(8, 8, 30, 40))})
    batch = Batch(
        torch.zeros(1, 3, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool),
        torch.tensor([0]),
        ["a"],
    )
    batch.masks[:, :, 10:30, 10:30] = True
    model.train()
    model(batch, RolloutPlan(3, "mask", (0,))).frames[2].steps[0].low_res.sum().backward()
    model.zero_grad(set_to_none=True)
    model.eval()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "no object to track"),
        ({7: (3, box(0, 0, 4, 4))}, "object 7 is on frame 3; the video has 0 to 2"),
        ({7: (0, box(0, 0, 4, 4, 32, 32))}, r"object 7 has shape \(32, 32\), its frame \(64, 64\)"),
        ({7: (0, PointPrompt(np.zeros((2, 2)), np.ones(1)))}, r"1 labels need \[P, 2\] coordinates"),
    ],
)
def test_prompts_that_do_not_fit(model, prompts, message):
    with pytest.raises(PromptError, match=message):
        list(propagate(model, video(3), prompts, 3))


def test_videos_that_do_not_have_their_length(model):
    with pytest.raises(PromptError, match="ended after 1 frames, before the prompt on frame 2"):
        list(propagate(model, video(1), {1: (2, box(0, 0, 4, 4))}, 3))
    with pytest.raises(PromptError, match="goes on after its 2 frames"):
        list(propagate(model, video(3), {1: (0, box(0, 0, 40, 40))}, 2))
