"""Video folders: layouts, mask kinds and their defects."""

from __future__ import annotations

import shutil
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from sam2fast.config import DatasetConfig
from sam2fast.data.defects import collecting
from sam2fast.data.files import check_image, decode_image, decode_labels
from sam2fast.data.formats import open_dataset
from sam2fast.data.sample import DataError


def open_folder(root, **options):
    return open_dataset(DatasetConfig(root=str(root), **options), "data", seed=0)


def write_png(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)


def test_palette_masks_and_frames(video_folder):
    dataset = open_folder(video_folder({"b": 4, "a": 3}))
    assert [record.name for record in (dataset[0], dataset[1])] == ["a", "b"]
    record = dataset[1]
    assert (record.num_frames, record.size, list(record.annotated)) == (4, (40, 60), [0, 1, 2, 3])
    assert list(record.masks(0)) == [1, 2] and list(record.masks(1)) == [1]
    mask = record.masks(1)[1]
    assert mask.dtype == bool and mask.sum() == record.masks(1).area(1) == 100 and mask[5:15, 7:17].all()
    first, third = record.frames([0, 2])
    assert first.shape == (40, 60, 3) and first.dtype == np.uint8 and (first != third).any()
    assert (record.frames([2])[0] == third).all()


def test_colors_are_red_green_blue(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200
    write_png(tmp_path / "JPEGImages/v/0.png", image)
    write_png(tmp_path / "Annotations/v/0.png", np.ones((8, 8), np.uint8))
    assert (open_folder(tmp_path)[0].frames([0])[0] == [200, 0, 0]).all()


def test_sparse_annotations(video_folder):
    record = open_folder(video_folder({"a": 10}, every=4))[0]
    assert (record.num_frames, list(record.annotated)) == (10, [0, 4, 8])


def test_gray_masks(video_folder):
    root = video_folder({"a": 4})
    labels = np.zeros((40, 60), np.uint8)
    labels[:10], labels[10:12] = 3, 255
    folder = root / "Annotations/a"
    write_png(folder / "00000.png", np.where(labels > 0, 255, 0).astype(np.uint8))
    write_png(folder / "00001.png", labels)
    write_png(folder / "00002.png", np.stack([np.where(labels > 0, 255, 0).astype(np.uint8)] * 3, -1))
    write_png(folder / "00003.png", np.stack([labels, labels * 0, labels], -1))
    record = open_folder(root)[0]
    areas = [{k: int(mask.sum()) for k, mask in record.masks(frame).items()} for frame in range(3)]
    assert areas == [{1: 720}, {3: 600}, {1: 720}]  # black and white: object 1; else 255 is void
    with pytest.raises(DataError, match=r"00003\.png has image mode RGB"):
        record.masks(3)


def test_one_folder_per_object(video_folder):
    root = video_folder({"a": 5})
    frames, masks = root / "JPEGImages", root / "Annotations"
    shutil.rmtree(masks)
    for name, numbers in (("000", (0, 4)), ("007", (4,))):
        for number in numbers:
            mask = np.zeros((40, 60), np.uint8)
            mask[: 10 + number] = 255  # objects overlap
            write_png(root / "Annotations_6fps/a" / name / f"{number:05d}.png", mask)
    frames.rename(root / "JPEGImages_24fps")
    record = open_folder(root)[0]
    assert list(record.annotated) == [0, 4]
    assert {k: int(mask.sum()) for k, mask in record.masks(0).items()} == {0: 600}
    assert {k: int(mask.sum()) for k, mask in record.masks(4).items()} == {0: 840, 7: 840}


def test_masks_of_one_object_are_all_above_zero(video_folder):
    """Antialiased or with a palette; a folder without a number makes the positions of all folders their numbers."""
    root = video_folder({"a": 1})
    shutil.rmtree(root / "Annotations")
    soft = np.zeros((40, 60), np.uint8)
    soft[:10], soft[10] = 255, 128
    write_png(root / "Annotations/a/2/00000.png", soft)
    palette = Image.fromarray(np.where(soft == 255, soft, 0))
    palette.putpalette(list(range(256)) * 3)
    (root / "Annotations/a/cat").mkdir()
    palette.save(root / "Annotations/a/cat/00000.png")
    masks = open_folder(root)[0].masks(0)
    assert {k: int(mask.sum()) for k, mask in masks.items()} == {1: 660, 2: 600}


def test_an_image_beside_the_videos_is_no_video(video_folder):
    root = video_folder({"a": 2, "b": 2})
    shutil.copy(root / "JPEGImages/a/00000.jpg", root / "JPEGImages/thumb.jpg")
    shutil.copy(root / "JPEGImages/a/00000.jpg", root / "JPEGImages/thumb.png")
    with collecting() as notes:
        assert [record.name for record in open_folder(root)] == ["a", "b"]
    assert [(defect.is_warning, "thumb.jpg, " in defect.reason) for defect in notes.defects] == [(True, True)]


@pytest.mark.parametrize("use", [decode_image, check_image, decode_labels])
def test_headers_of_impossible_sizes_are_defects(use):
    png = bytearray(cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes())
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    with pytest.raises(DataError, match="huge.png"):
        use(bytes(png), "huge.png")


def test_layouts_and_names(video_folder):
    root = video_folder({"a": 3})
    for part in ("JPEGImages", "Annotations"):
        (root / part / "480p").mkdir()
        (root / part / "a").rename(root / part / "480p/a")
    for path in sorted((root / "Annotations/480p/a").iterdir()):
        path.rename(path.with_name(path.stem[2:] + ".png"))  # 000.png for 00000.jpg
    record = open_folder(root)[0]
    assert (record.name, list(record.annotated)) == ("a", [0, 1, 2])
    elsewhere = open_folder(root / "JPEGImages", annotations=str(root / "Annotations"))
    assert list(elsewhere[0].masks(0)) == [1, 2]


def test_include_exclude_and_fraction(video_folder):
    root = video_folder({f"video{number}": 1 for number in range(8)} | {"other": 1})
    names = lambda **options: [record.name for record in open_folder(root, **options)]  # noqa: E731
    assert names(include=("video[0-3]", "other"), exclude=("*2",)) == ["other", "video0", "video1", "video3"]
    assert len(names(fraction=0.5)) == 4 and names(fraction=0.5) == names(fraction=0.5)
    assert set(names(fraction=0.5)) < set(names())
    with pytest.raises(DataError, match=r"include pattern 'vide3' matches none of its 9 names; nearest: 'video\d'"):
        names(include=("video1", "vide3"))
    with pytest.raises(DataError, match=r"exclude \['\*'\] leaves none of its 9 names"):
        names(exclude=("*",))


def test_missing_and_unknown_folders(tmp_path, video_folder):
    with pytest.raises(DataError, match=r"(?s)no folder at .*nowhere \(.* holds .*JPEGImages/VIDEO"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"(?s)cannot recognize the format of .*notes\.txt.*video_folder:.*coco:"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="expected JPEGImages/ with Annotations/"):
        open_folder(tmp_path, format="video_folder")
    root = video_folder({"a": 2})
    with pytest.raises(DataError, match=r"no annotations at .*lost"):
        open_folder(root, annotations=str(tmp_path / "lost"))


def test_masks_without_frames(video_folder):
    root = video_folder({"a": 4, "b": 2})
    (root / "JPEGImages/a/00002.jpg").unlink()
    record = open_folder(root)[0]
    with pytest.raises(DataError, match=r"mask .*a/00002\.png has no frame of that name in .*holds 3 frames"):
        list(record.annotated)
    shutil.rmtree(root / "JPEGImages/b")
    with pytest.raises(DataError, match=r"1 video with masks in .* but no frames in .*: b; .*exclude"):
        open_folder(root)
    assert len(open_folder(root, exclude=("b",))) == 1
    shutil.rmtree(root / "Annotations")
    (root / "Annotations").mkdir()
    with pytest.raises(DataError, match=r"none of its 1 videos \(a\) has masks"):
        open_folder(root)


def test_sizes_that_differ(video_folder):
    root = video_folder({"a": 4})
    record = open_folder(root)[0]
    for frame, shape in ((0, (40, 59)), (1, (41, 60)), (2, (40, 58))):
        write_png(root / f"Annotations/a/{frame:05d}.png", np.ones(shape, np.uint8))
    with pytest.warns(UserWarning, match=r"00000\.png: the mask is 59 x 40, its frame 60 x 40"):
        assert record.masks(0)[1].shape == (40, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per dataset
        assert record.masks(1)[1].all()
    with pytest.raises(DataError, match=r"00002\.png: the mask is 58 x 40, its frame 60 x 40.*exclude"):
        record.masks(2)
    write_png(root / "JPEGImages/a/00003.jpg", np.zeros((40, 80, 3), np.uint8))
    with pytest.raises(DataError, match=r"00003\.jpg is 80 x 40, the first frame of the video 60 x 40"):
        record.frames([0, 3])


@pytest.mark.parametrize("keep", [0, 30, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["JPEGImages/a/00001.jpg", "Annotations/a/00001.png"])
def test_damaged_images_are_named(video_folder, kind, keep):
    root = video_folder({"a": 2})
    path = root / kind
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    record = open_folder(root)[0]
    with pytest.raises(DataError, match=rf"{path.name}.*exclude"):
        record.frames([1]), record.masks(1)


def test_davis(shared_data):
    dataset = open_folder(shared_data / "davis2016")
    counts = {record.name: (record.num_frames, len(record.annotated)) for record in dataset}
    assert len(counts) == 8 and sum(frames for frames, _ in counts.values()) == 394
    assert all(frames == annotated for frames, annotated in counts.values())
    swan = dataset[0]
    assert swan.size == (480, 854) and {k: int(mask.sum()) for k, mask in swan.masks(0).items()} == {1: 41343}


def test_sparse_davis_with_a_mask_one_pixel_too_narrow(shared_data):
    record = open_folder(shared_data / "davis2017_judo_multi")[0]
    assert (record.name, record.num_frames, list(record.annotated)) == ("judo", 16, [0, 5, 8, 13])
    with pytest.warns(UserWarning) as caught:
        masks = {frame: record.masks(frame) for frame in record.annotated}
    assert len(caught) == 1 and "00005.png: the mask is 853 x 480, its frame 854 x 480" in str(caught[0].message)
    assert [list(masks[frame]) for frame in record.annotated] == [[1], [2], [3], [4]]
    assert all(mask.shape == (480, 854) for frame in masks.values() for mask in frame.values())


def test_single_video_without_a_folder_of_its_own(shared_data):
    record = open_folder(shared_data / "pumavos_chair")[0]
    assert (record.name, record.num_frames, record.size) == ("pumavos_chair", 60, (480, 720))
    assert len(record.annotated) == 60 and list(record.masks(59)) == [1]
