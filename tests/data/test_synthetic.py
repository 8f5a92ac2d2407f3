"""Synthetic scenes and the four formats they are written in."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from sam2fast.config import DatasetConfig
from sam2fast.data.formats import open_dataset
from sam2fast.data.synthetic import FORMATS, Scene, SceneConfig, SyntheticError, main, write_dataset

SIZE = (96, 128)
IMAGE_SCENES = {"sa1b": {"objects": (3, 6), "leave": 0.0}, "coco": {"objects": (2, 5), "leave": 0.0}}
"""What the scenes of image formats hold."""


def small_scene(seed: int, index: int = 0, **config) -> Scene:
    return Scene(SceneConfig(height=SIZE[0], width=SIZE[1], **config), np.random.default_rng([seed, index]))


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def labels_over_time(scene: Scene, frames: int = 16) -> np.ndarray:
    return np.stack([scene.render(t)[1] for t in range(frames)])


def test_objects_move_so_far_that_the_first_mask_predicts_little():
    overlaps = []
    for seed in range(12):
        scene = small_scene(seed)
        labels = labels_over_time(scene)
        for k in range(1, scene.num_objects + 1):
            first, later = labels[0] == k, labels[8:] == k
            if first.any():
                overlaps.append((first & later).sum() / (first | later).sum())
    assert np.mean(overlaps) < 0.2


def test_objects_are_large_enough_to_learn():
    areas = []
    for seed in range(12):
        scene = small_scene(seed)
        areas += [(scene.render(0)[1] == k).mean() for k in range(1, scene.num_objects + 1)]
    assert 0.05 < np.median(areas) < 0.25
    assert max(areas) < 0.35


def test_objects_leave_and_come_back_are_hidden_and_come_late():
    returned = late = occluded = 0
    for seed in range(12):
        scene = small_scene(seed)
        labels = labels_over_time(scene, 32)
        for k in range(1, scene.num_objects + 1):
            area = (labels == k).sum((1, 2))
            gone = np.flatnonzero(area == 0)
            late += area[0] == 0
            returned += bool(len(gone)) and area[0] > 0 and (area[gone[0] :] > 0).any()
            occluded += (area > 0).all() and area.min() < 0.5 * area.max()
    assert returned >= 3 and late >= 1 and occluded >= 3


def test_masks_are_the_visible_pixels():
    """Objects are vivid and backgrounds are muted, so the saturation gives the masks away, edge pixels apart."""
    for seed in range(6):
        image, labels = small_scene(seed).render(8)
        vivid = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1] > 88
        inside, neighborhood = (f((labels > 0).astype(np.uint8), np.ones((3, 3))) > 0 for f in (cv2.erode, cv2.dilate))
        assert vivid[inside].mean() > 0.97
        assert vivid[~neighborhood].mean() < 0.03


def test_time_is_continuous():
    """A frame between two annotated ones lies between them, as a video at a higher frame rate needs."""
    scene = small_scene(1)
    start, middle, end = (scene.render(t)[1] > 0 for t in (0, 0.25, 1))
    assert 0 < (start ^ middle).sum() < (start ^ end).sum()


@pytest.mark.parametrize("format", FORMATS)
def test_the_seed_decides_every_byte(tmp_path, format):
    options = {"frames": 3, "size": SIZE}
    first = digest(write_dataset(tmp_path / "a", format, 2, 5, **options))
    assert first == digest(write_dataset(tmp_path / "b", format, 2, 5, **options))
    other = digest(write_dataset(tmp_path / "c", format, 2, 6, **options))
    assert first.keys() == other.keys()
    images = [name for name in first if name.endswith((".jpg", ".mp4"))]
    assert images and all(first[name] != other[name] for name in images)


def test_an_item_does_not_depend_on_the_count(tmp_path):
    few = digest(write_dataset(tmp_path / "few", "video_folder", 1, 5, frames=2, size=SIZE))
    many = digest(write_dataset(tmp_path / "many", "video_folder", 2, 5, frames=2, size=SIZE))
    frames = [name for name in few if "scene" in name]
    assert frames and all(few[name] == many[name] for name in frames)


def test_video_folder(tmp_path):
    root = write_dataset(tmp_path / "data", "video_folder", 2, 7, frames=4, size=SIZE)
    scene = small_scene(7, 1)
    for t in range(4):
        image, labels = scene.render(t)
        annotation = Image.open(root / "Annotations" / "scene00001" / f"{t:05d}.png")
        assert annotation.mode == "P" and annotation.getpalette()[3:6] == [128, 0, 0]
        assert np.array_equal(np.asarray(annotation), labels)
        frame = np.asarray(Image.open(root / "JPEGImages" / "scene00001" / f"{t:05d}.jpg")).astype(int)
        assert np.abs(frame - image).mean() < 8


def test_sav_video_has_b_frames_and_exact_masks_on_every_fourth_frame(tmp_path):
    root = write_dataset(tmp_path / "data", "sav", 1, 7, frames=5, size=SIZE)
    scene = small_scene(7)
    with av.open(root / "sav_000001.mp4") as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24
        times = [packet.pts for packet in container.demux(stream) if packet.size]
    assert len(times) == 17 and times != sorted(times)
    with av.open(root / "sav_000001.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    for i in (0, 3, 16):
        errors = [np.abs(frames[i] - scene.render(j / 4)[0]).mean() for j in (i - 1, i, i + 1)]
        assert np.argmin(errors) == 1
    masklet = json.loads((root / "sav_000001_manual.json").read_text())["masklet"]
    assert len(masklet) == 5
    for t, masks in enumerate(masklet):
        labels = scene.render(t)[1]
        assert all((rle.decode(mask) == (labels == k)).all() for k, mask in enumerate(masks, start=1))


def test_sav_json_has_the_fields_of_the_real_one(tmp_path, shared_data):
    real = json.loads((shared_data / "sav" / "sav_000001_manual.json").read_text())
    root = write_dataset(tmp_path / "data", "sav", 1, 7, frames=3, size=SIZE)
    ours = json.loads((root / "sav_000001_manual.json").read_text())
    assert list(ours) == list(real)
    assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in real.items()}
    per_object = [key for key, value in real.items() if isinstance(value, list) and key != "masklet"]
    assert all(len(ours[key]) == ours["masklet_num"] for key in per_object)
    assert all(type(ours[key][0]) is type(real[key][0]) for key in per_object)


def test_sav_statistics_follow_the_definitions_of_the_real_json(shared_data):
    from sam2fast.data.synthetic.writers import sav_annotation

    real = json.loads((shared_data / "sav" / "sav_000001_manual.json").read_text())
    ours = sav_annotation(real["video_id"], real["masklet"], int(real["video_frame_count"]))
    same = (
        "video_duration",
        "video_height",
        "video_width",
        "video_resolution",
        "masklet_id",
        "masklet_size_bucket",
        "masklet_size_rel",
        "masklet_visibility_changes",
        "masklet_first_appeared_frame",
        "masklet_frame_count",
    )
    assert {key: ours[key] for key in same} == {key: real[key] for key in same}


def test_sa1b_folder_and_tar_hold_the_same_files(tmp_path):
    folder = write_dataset(tmp_path / "folder", "sa1b", 2, 7, size=SIZE)
    packed = write_dataset(tmp_path / "tar", "sa1b", 2, 7, size=SIZE, tar=True)
    with tarfile.open(packed / "sa_000000.tar") as archive:
        members = {Path(member.name).name: archive.extractfile(member).read() for member in archive}
    assert members == {path.name: path.read_bytes() for path in folder.glob("sa_*")}
    image = np.asarray(Image.open(io.BytesIO(members["sa_2.jpg"])))
    content = json.loads(members["sa_2.json"])
    assert image.shape == (content["image"]["height"], content["image"]["width"], 3) == (*SIZE, 3)
    assert content["image"]["file_name"] == "sa_2.jpg"
    for annotation in content["annotations"]:
        mask = rle.decode(annotation["segmentation"])
        ((x, y),) = annotation["point_coords"]
        assert mask.sum() == annotation["area"] and mask[int(y), int(x)]
        left, top, width, height = annotation["bbox"]
        assert [left, top, width + 1, height + 1] == rle.toBbox(annotation["segmentation"]).tolist()


def test_coco_polygons_and_run_lengths_are_exact(tmp_path):
    root = write_dataset(tmp_path / "data", "coco", 3, 7, size=SIZE)
    coco = COCO(str(root / "instances.json"))
    kinds = {type(annotation["segmentation"]) for annotation in coco.anns.values()}
    assert kinds == {list, dict}
    for image_id, entry in coco.imgs.items():
        labels = small_scene(7, image_id - 1, **IMAGE_SCENES["coco"]).render(0)[1]
        masks = [coco.annToMask(annotation) > 0 for annotation in coco.loadAnns(coco.getAnnIds(image_id))]
        truth = [labels == k for k in np.unique(labels[labels > 0])]
        assert len(masks) == len(truth)
        assert all((mask == expected).all() for mask, expected in zip(masks, truth, strict=True))
        assert (root / "images" / entry["file_name"]).is_file()


@pytest.mark.parametrize("format", FORMATS)
def test_readers_recognize_what_was_written(tmp_path, format):
    root = write_dataset(tmp_path / "data", format, 2, 7, frames=3, size=SIZE)
    dataset = open_dataset(DatasetConfig(root=str(root)), "synthetic", seed=0)
    assert len(dataset) == 2
    record = dataset[1]
    scene = small_scene(7, 1, **IMAGE_SCENES.get(format, {}))
    assert list(record.annotated) == {"video_folder": [0, 1, 2], "sav": [0, 4, 8]}.get(format, [0])
    for t, frame in enumerate(record.annotated):
        image, labels = scene.render(t)
        masks = record.masks(frame)
        visible = [labels == k for k in range(1, scene.num_objects + 1) if (labels == k).any()]
        assert all((mask == expected).all() for mask, expected in zip(masks.values(), visible, strict=True))
        assert np.abs(record.frames([frame])[0].astype(int) - image).mean() < 8


def test_a_complete_dataset_is_reused_and_another_is_not_overwritten(tmp_path):
    root = tmp_path / "data"
    write_dataset(root, "sa1b", 1, 0, size=SIZE)
    (root / "sa_1.jpg").write_bytes(b"marker")
    write_dataset(root, "sa1b", 1, 0, size=SIZE)
    assert (root / "sa_1.jpg").read_bytes() == b"marker"
    with pytest.raises(SyntheticError, match="count 1 instead of 2"):
        write_dataset(root, "sa1b", 2, 0, size=SIZE)
    write_dataset(root, "sa1b", 2, 0, size=SIZE, overwrite=True)
    assert (root / "sa_2.jpg").is_file() and (root / "sa_1.jpg").read_bytes() != b"marker"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SyntheticError, match="not a synthetic dataset"):
        write_dataset(tmp_path, "coco", 1, 0, size=SIZE, overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    render, calls = Scene.render, []

    def fails_at_third(self, time):
        calls.append(time)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return render(self, time)

    monkeypatch.setattr(Scene, "render", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", "video_folder", 2, 0, frames=2, size=SIZE)
    assert not list(tmp_path.iterdir())


def test_a_dataset_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    root, rename = write_dataset(tmp_path / "data", "sa1b", 1, 0, size=SIZE), Path.rename

    def fails(self, target):
        if ".partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space"):
        write_dataset(root, "sa1b", 2, 0, size=SIZE, overwrite=True)
    assert (root / "sa_1.jpg").is_file() and [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "davis"}, "unknown format 'davis'"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"size": (95, 128)}, "two even numbers"),
        ({"tar": True}, "sa1b only"),
    ],
)
def test_impossible_parameters(tmp_path, options, message):
    with pytest.raises(SyntheticError, match=message):
        write_dataset(tmp_path / "data", **{"format": "coco", "count": 1, **options})


def test_command_line(tmp_path, capsys):
    root = tmp_path / "data"
    arguments = [
        "--root",
        str(root),
        "--format",
        "sav",
        "--count",
        "1",
        "--seed",
        "4",
        "--frames",
        "2",
        "--size",
        "96",
        "128",
    ]
    assert main(arguments) == 0
    assert sorted(path.name for path in root.glob("sav*")) == ["sav_000001.mp4", "sav_000001_manual.json"]
    assert "1 sav items" in capsys.readouterr().out
    assert main([*arguments, "--seed", "5"]) == 2
    assert "seed 4 instead of 5" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*arguments[2:], "--root", str(tmp_path / "file" / "data")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "file" in text and text.count("\n") == 1
