"""Clips: which frames, which objects, in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam2fast.config import AugmentConfig, DatasetConfig, MixItem, OcclusionConfig, PromptConfig, StageConfig
from sam2fast.data.augment import FILL
from sam2fast.data.formats import open_dataset
from sam2fast.data.index import ObjectCounts
from sam2fast.data.masks import label_masks
from sam2fast.data.mixture import Mixture
from sam2fast.data.render import render
from sam2fast.data.sample import DataError
from sam2fast.data.sampling import ClipDataset, Wanted, plan_sample, repeat_factors, sample_window

OFF = AugmentConfig(flip=0, scale=(1, 1), brightness=0, contrast=0, saturation=0, blur=0)
SIZE = (32, 32)


class Record:
    """Annotated at every 4th frame; `visible[i]` names the objects of the i-th annotated frame."""

    name, size = "clip", SIZE

    def __init__(self, visible, height=4):
        self.visible, self.height = visible, height
        self.annotated = [4 * position for position in range(len(visible))]
        self.num_frames = 4 * len(visible)

    def frames(self, indices):
        return [np.full((*SIZE, 3), index, np.uint8) for index in indices]

    def masks(self, frame):
        labels = np.zeros(SIZE, np.uint8)
        for number in self.visible[frame // 4]:
            labels[number * self.height : (number + 1) * self.height] = number
        return label_masks(labels, SIZE)

    def areas(self, frame):
        return self.masks(frame).areas()


class Records:
    """A dataset of records in memory."""

    name = "data"

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        record.name = f"clip{index}"
        return record


def windows(record, count=60, **options):
    item = MixItem(dataset="data", **options)
    return [sample_window(record, item, np.random.default_rng(seed)) for seed in range(count)]


def steps(window):
    return np.diff(window.frames).tolist()


def test_windows_are_annotated_frames_in_a_row():
    found = windows(Record([{1, 2, 3}] * 10), frames=4, max_objects=2)
    assert {window.frames[0] for window in found} == {0, 4, 8, 12, 16, 20, 24}
    assert all(steps(window) == [4, 4, 4] and len(window.candidates) == 3 for window in found)
    assert {tuple(window.candidates[:2]) for window in found} == {(a, b) for a in (1, 2, 3) for b in {1, 2, 3} - {a}}
    assert not any(hidden for window in found for hidden in window.hidden)


def test_stride_and_reversal():
    found = windows(Record([{1}] * 10), frames=4, stride=(1, 5), reverse=0.5)
    assert {tuple(steps(window)) for window in found} == {(s * k,) * 3 for s in (4, 8, 12) for k in (1, -1)}
    assert all(min(window.frames) >= 0 and max(window.frames) <= 36 for window in found)


def test_objects_are_visible_in_the_first_frame():
    visible = [set(), set(), {1}, set(), {2}, {2, 3}, set(), set()]
    found = windows(Record(visible), frames=3)
    assert {window.frames[0] for window in found} == {8, 16, 20}
    assert all(set(window.candidates) == visible[window.frames[0] // 4] for window in found)
    backward = windows(Record(visible), frames=3, reverse=1.0)
    assert {window.frames[0] for window in backward} == {8, 16, 20}
    assert all(steps(window) == [-4, -4] for window in backward)
    # played backwards, no clip starts with an object: forwards instead
    assert all(window.frames == [0, 4, 8] for window in windows(Record([{1}, set(), set()]), frames=3, reverse=1.0))
    assert windows(Record([set()] * 5), count=3, frames=3) == [None] * 3


def test_large_objects_are_left_out():
    found = windows(Record([{1}] * 3, height=16), frames=1, max_area=0.4)
    assert found == [None] * len(found)
    assert windows(Record([{1}], height=4), count=1, frames=1, max_area=0.125)[0].candidates == [1]


def test_small_objects_are_left_out():
    record = Record([{1, 2}] * 3)  # 128 pixels each, an eighth of the frame
    assert windows(record, count=1, min_area=0.125)[0] is not None
    assert windows(record, count=2, min_area=0.13) == [None] * 2
    assert windows(record, count=1, min_area=128)[0] is not None
    assert windows(record, count=2, min_area=129) == [None] * 2
    with pytest.raises(ValueError, match=r"min_area 0.5 must be below max_area 0.5"):
        MixItem(dataset="data", min_area=0.5, max_area=0.5)


def test_objects_visible_anywhere_in_the_window():
    visible = [set(), set(), {1}, {1, 2}, {3}, set(), set(), set()]
    found = windows(Record(visible), 100, frames=3, reverse=0.5, visible="window")
    assert {min(window.frames) for window in found} == {0, 4, 8, 12, 16}
    for window in found:
        assert set(window.candidates) == set().union(*(visible[frame // 4] for frame in window.frames))
    item = MixItem(dataset="data", frames=3, visible="window", max_objects=2)
    sizes = set()
    for seed in range(20):
        sample = render(plan_sample(Record(visible), item, OFF, 64, np.random.default_rng(seed)))
        shown = sample.masks.flatten(2).any(-1)
        assert shown.any(0).all() and len(sample.object_ids) == shown.shape[1] <= 2
        sizes.add(bool(shown[0].all()))
    assert sizes == {True, False}
    blank = OcclusionConfig(probability=1.0, max_frames=1)  # what only a blanked frame shows is not followed
    found = windows(Record([set(), {1}, set()]), 20, frames=3, visible="window", occlusion=blank)
    assert all(window is not None and not any(window.hidden) for window in found)


def test_windows_keep_to_the_config():
    """Strides and directions come as often as they should, and every place of the video."""
    count = 2000
    found = windows(Record([{1, 2}] * 60), count, frames=8, stride=(1, 4), reverse=0.3)
    strides = np.array([abs(steps(window)[0]) // 4 for window in found])
    backward = np.array([steps(window)[0] < 0 for window in found])
    assert all(len(window.frames) == 8 and len(set(steps(window))) == 1 for window in found)
    assert abs(np.bincount(strides, minlength=5)[1:] / count - 0.25).max() < 0.04
    assert abs(backward.mean() - 0.3) < 0.04
    starts = np.array([min(window.frames) // 4 for window in found])[strides == 1]
    assert set(starts) == set(range(53))


def test_the_wanted_number_of_objects_is_found():
    visible = [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}, set(), {1, 2}, {1}, {1}]
    counts = np.array([len(objects) for objects in visible], np.uint8)
    item = MixItem(dataset="data", frames=2, max_objects=3)
    for objects, first in ((1, {0, 24}), (2, {4, 20}), (3, {8, 12})):
        found = [sample_window(Record(visible), item, np.random.default_rng(seed), Wanted(objects, counts))
                 for seed in range(40)]  # fmt: skip
        assert {window.frames[0] for window in found} == first
        plan = plan_sample(Record(visible), item, OFF, 64, np.random.default_rng(0), Wanted(objects, counts))
        assert len(plan.first) == objects
    wanted = Wanted(2, np.array([1, 3, 1], np.uint8))  # none has two: one with more gives two of them, one of less all
    plan = plan_sample(Record([{1}, {1, 2, 3}, {1}]), item, OFF, 64, np.random.default_rng(0), wanted)
    assert len(plan.first) in (1, 2)
    for size in (5, len(visible)):  # counts that are out of date
        stale = Wanted(2, np.zeros(size, np.uint8))
        assert plan_sample(Record(visible), item, OFF, 64, np.random.default_rng(0), stale) is not None


def test_steps_have_equally_many_objects_in_the_end():
    """Clips as they are trained on, with augmentation: balanced, the samples of a step differ by far less."""
    rng = np.random.default_rng(0)
    most = rng.integers(1, 5, 240)
    visible = [[set(rng.permutation(level)[: rng.integers(0, level + 1)] + 1) for _ in range(9)] for level in most]
    dataset = Records([Record(objects) for objects in visible])
    counts = ObjectCounts.of([[len(shown) for shown in objects] for objects in visible])
    for options in ({}, {"visible": "window"}, {"reverse": 1.0, "stride": (1, 2)}):
        item = MixItem(dataset="data", frames=3, max_objects=3, **options)
        augment = AugmentConfig(scale=(0.8, 1.2))
        spread = []
        for balanced in (None, counts):
            clips = ClipDataset(dataset, item, augment, 32, 0, group=8, counts=balanced)
            objects = np.array([len(clips.plan(number).first) for number in range(240)]).reshape(-1, 8)
            spread.append((objects.max(1) - objects.mean(1)).mean() / objects.mean())
        assert spread[0] > 0.3 and spread[1] < 0.08, options


def test_several_lengths_are_several_items(davis):
    """The number of frames is that of the item, so the shared choice of the item makes it equal on all ranks."""
    items = tuple(MixItem(dataset="davis", frames=frames, weight=1 / frames) for frames in (2, 3, 4))
    stage = StageConfig(name="stage", steps=10, mixture="probability", data=items,
                        prompts=PromptConfig(init_frames=1))  # fmt: skip
    mixture = Mixture(stage, 0, 0)
    clips = [ClipDataset(davis, item, OFF, 32, [0, 0, index]) for index, item in enumerate(items)]
    lengths = [len(clips[mixture.item(step)].plan(step).frames) for step in range(40)]
    assert lengths == [items[mixture.item(step)].frames for step in range(40)] and set(lengths) == {2, 3, 4}


def test_repeats_by_name(davis):
    item = MixItem(dataset="davis", frames=2, repeat=2, repeat_names={"[ab]": 0.5, "b": 7, "c": 3})
    assert repeat_factors(davis, item).tolist() == [0.5, 0.5, 3, 2, 2]
    clips = ClipDataset(davis, item, OFF, 32, seed=0)
    names = [clips.plan(number).record.name for number in range(240)]
    assert abs(np.array([names.count(name) for name in "abcde"]) / 30 - [0.5, 0.5, 3, 2, 2]).max() < 0.3
    assert repeat_factors(davis, MixItem(dataset="davis")) is None
    with pytest.raises(DataError, match=r"'x\*' of `repeat_names` matches none of its 5 names \(the first is 'a'"):
        ClipDataset(davis, MixItem(dataset="davis", repeat_names={"x*": 2}), OFF, 32, seed=0)


def test_a_short_video_is_an_error_that_names_it():
    with pytest.raises(
        DataError,
        match=r"video 'clip' of dataset 'data' has 6 annotated frames, a clip of 4 frames at "
        r"stride 2 needs 7; lower `frames` or `stride`.*exclude",
    ):
        windows(Record([{1}] * 6), frames=4, stride=(2, 3))
    assert windows(Record([{1}] * 7), count=5, frames=4, stride=(2, 3))[0].frames == [0, 8, 16, 24]


def test_blank_occlusion():
    options = {"frames": 6, "occlusion": OcclusionConfig(probability=1.0, max_frames=3)}
    hidden = {tuple(np.flatnonzero(window.hidden)) for window in windows(Record([{1}] * 9), 200, **options)}
    assert hidden == {tuple(range(a, a + n)) for n in (1, 2, 3) for a in range(1, 6 - n)}
    item = MixItem(dataset="data", **options)
    sample = render(plan_sample(Record([{1}] * 9), item, OFF, 64, np.random.default_rng(0)))
    blank = (sample.frames == torch.tensor(FILL)[None, :, None, None]).flatten(1).all(1)
    assert blank.any() and not blank[0] and not blank[-1]
    assert (sample.masks.flatten(1).any(1) != blank).all()
    options["frames"] = 2  # no frame between the first and the last
    assert not any(any(window.hidden) for window in windows(Record([{1}] * 9), **options))


def test_cut_occlusion():
    occlusion = OcclusionConfig(probability=1.0, max_frames=3, mode="cut")
    found = windows(Record([{1}] * 6), 100, frames=4, occlusion=occlusion)
    gaps = {tuple(step // 4 for step in steps(window)) for window in found}
    assert gaps == {(2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 1, 1), (1, 3, 1), (1, 1, 3)}
    assert not any(any(window.hidden) for window in found)
    assert all(steps(window) == [4, 4, 4] for window in windows(Record([{1}] * 4), frames=4, occlusion=occlusion))
    backward = windows(Record([{1}] * 6), 20, frames=4, occlusion=occlusion, reverse=1.0)
    assert all(max(steps(window)) < 0 for window in backward)


def test_samples_are_square_and_absent_objects_empty():
    record = Record([{1, 2}, {1}, {2}])
    sample = render(plan_sample(record, MixItem(dataset="data", frames=3), OFF, 64, np.random.default_rng(0)))
    assert sample.frames.shape == (3, 3, 64, 64) and sample.frames.dtype == torch.uint8
    assert sample.masks.shape == (3, 2, 64, 64) and sample.masks.dtype == torch.bool
    assert sample.object_ids == [1, 2] and sample.sample_id == "data/clip@0,4,8"
    assert sample.masks.flatten(2).sum(-1).tolist() == [[512, 512], [512, 0], [0, 512]]
    assert sample.frames[:, 0, 0, 0].tolist() == [0, 4, 8]


def test_augmentation_never_leaves_the_first_frame_without_an_object():
    item = MixItem(dataset="data", frames=2)
    for seed in range(40):  # both objects are thin and near the top: crops of a quarter often lose one or both
        record = Record([{1, 2}] * 2, height=2)
        sample = render(plan_sample(record, item, AugmentConfig(scale=(4, 4)), 64, np.random.default_rng(seed)))
        assert sample.masks.shape[1] == len(sample.object_ids) > 0 and sample.masks[0].flatten(1).any(1).all()


@pytest.fixture
def davis(video_folder):
    return open_dataset(DatasetConfig(root=str(video_folder({name: 6 for name in "abcde"}))), "davis", seed=0)


def test_each_pass_shows_every_record_once_in_another_order(davis):
    clips = ClipDataset(davis, MixItem(dataset="davis", frames=2), AugmentConfig(), 32, seed=3)
    assert len(clips) == 5
    ids = [clips[number].sample_id for number in range(15)]
    passes = [[name.split("/")[1][0] for name in ids[start : start + 5]] for start in (0, 5, 10)]
    assert all(sorted(names) == list("abcde") for names in passes) and len({tuple(names) for names in passes}) > 1


def test_content_depends_on_seed_and_number_alone(davis):
    def build(seed):
        return ClipDataset(davis, MixItem(dataset="davis", frames=2), AugmentConfig(), 32, seed)

    once, again, other = build([3, 1]), build([3, 1]), build([3, 2])
    for number in (12, 0, 7):
        again[number + 1]
        a, b = once[number], again[number]
        assert a.sample_id == b.sample_id and torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    assert [once[n].sample_id for n in range(10)] != [other[n].sample_id for n in range(10)]
    assert not torch.equal(once[0].frames, once[5].frames)


def test_records_without_objects_are_replaced(video_folder):
    from PIL import Image

    root = video_folder({"a": 3, "b": 3})
    empty = Image.fromarray(np.zeros((40, 60), np.uint8))
    for frame in range(3):
        empty.save(root / f"Annotations/a/{frame:05d}.png")
    item = MixItem(dataset="davis", frames=2)

    def build(**options):
        return ClipDataset(open_dataset(DatasetConfig(root=str(root), **options), "davis", 0), item, OFF, 32, 0)

    assert {build()[number].sample_id.split("@")[0] for number in range(6)} == {"davis/b"}
    with pytest.raises(DataError, match=r"dataset 'davis': 30 draws, the last 'a', found no object"):
        build(exclude=("b",))[0]


def test_a_short_video_through_the_dataset(davis):
    with pytest.raises(DataError, match=r"'davis': no video is long enough for clips of 8 frames .* 'a', has 6"):
        ClipDataset(davis, MixItem(dataset="davis", frames=8), OFF, 32, 0)


def test_images_of_many_objects(shared_data):
    coco = open_dataset(DatasetConfig(root=str(shared_data / "coco_mini_val2017")), "coco", seed=0)
    clips = ClipDataset(coco, MixItem(dataset="coco", max_objects=64, max_area=0.9), AugmentConfig(), 128, 0)
    counts = [clips[number].masks.shape[1] for number in range(20)]
    assert max(counts) > 8 and min(counts) >= 1
