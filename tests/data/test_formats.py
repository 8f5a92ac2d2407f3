"""SA-V, SA-1B and COCO: reading, and their defects by name."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import tarfile
import warnings

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO

from sam2fast.config import DatasetConfig
from sam2fast.data.formats import open_dataset
from sam2fast.data.sample import DataError

HEIGHT, WIDTH = 48, 64


def open_at(root, **options):
    return open_dataset(DatasetConfig(root=str(root), **options), "data", seed=0)


def square(left, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[10:20, left : left + 10] = 1
    return mask


def rle(mask):
    encoded = coco.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def write_sav(root, write_video, frames=13, masklets=None, name="sav_000001", kind="manual", **fields):
    root.mkdir(exist_ok=True)
    images = write_video(root / f"{name}.mp4", frames, HEIGHT, WIDTH, g="6", bf="2")
    if masklets is None:
        masklets = [[rle(square(4 * frame)), rle(square(0) * (frame == 0))] for frame in range((frames + 3) // 4)]
    content = {
        "video_id": name,
        "video_frame_count": float(frames),
        "video_duration": frames / 24,
        "masklet": masklets,
        "masklet_id": list(range(len(masklets[0]))),
        **fields,
    }
    (root / f"{name}_{kind}.json").write_text(json.dumps(content))
    return images


def write_sa1b(folder, number, masks, damage=lambda content: None):
    folder.mkdir(parents=True, exist_ok=True)
    image = np.full((HEIGHT, WIDTH, 3), number, np.uint8)
    assert cv2.imwrite(str(folder / f"sa_{number}.jpg"), image)
    content = {
        "image": {"image_id": number, "width": WIDTH, "height": HEIGHT, "file_name": f"sa_{number}.jpg"},
        "annotations": [{"id": 10 + index, "segmentation": rle(mask)} for index, mask in enumerate(masks)],
    }
    damage(content)
    (folder / f"sa_{number}.json").write_text(json.dumps(content))


def test_sav(tmp_path, write_video):
    images = write_sav(tmp_path / "sav_000", write_video)
    record = open_at(tmp_path)[0]
    assert (record.name, record.num_frames, record.size) == ("sav_000001", 13, (HEIGHT, WIDTH))
    assert list(record.annotated) == [0, 4, 8, 12]
    assert all((image == images[index]).all() for index, image in zip((12, 4), record.frames([12, 4]), strict=True))
    assert list(record.masks(0)) == [0, 1] and list(record.masks(8)) == [0]
    assert (record.masks(8)[0] == square(8)).all()


def test_sav_videos_are_closed_with_their_record(tmp_path, write_video):
    """Not when Python next looks for cycles of objects: open decoders hold tens of MB."""
    write_sav(tmp_path / "sav_000", write_video)
    dataset = open_at(tmp_path)
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            record = dataset[0]
            assert len(record.frames([4, 8])) == 2 and len(os.listdir("/proc/self/fd")) == before + 1
            del record
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_sav_grid_and_gaps(tmp_path, write_video):
    masklets = [[rle(square(frame))] for frame in range(6)]
    masklets[2][0], masklets[4] = None, None
    write_sav(tmp_path, write_video, 12, masklets, fps=12)
    assert list(open_at(tmp_path)[0].annotated) == [0, 2, 6, 10]  # 24 frames and 12 annotations a second
    write_sav(tmp_path, write_video, 6, masklets)
    assert list(open_at(tmp_path)[0].annotated) == [0, 1, 3, 5]  # as many entries as frames


def test_sav_automatic_masklets(tmp_path, write_video):
    write_sav(tmp_path, write_video)
    write_sav(tmp_path, write_video, kind="auto", masklets=[[rle(square(30))]] * 4)
    assert [list(open_at(tmp_path, sav_annotations=kind)[0].masks(0)) for kind in ("manual", "auto", "both")] == [
        [0, 1],
        [1000],
        [0, 1, 1000],
    ]


def test_sav_defects_are_named(tmp_path, write_video):
    write_sav(tmp_path, write_video)
    path = tmp_path / "sav_000001_manual.json"
    good = json.loads(path.read_bytes())
    cut = json.loads(path.read_bytes())
    cut["masklet"][1][0]["counts"] = cut["masklet"][1][0]["counts"][:-1]
    other_size = {**good, "masklet": [[rle(square(0, 50, 60))] * 2] * 4}
    ragged = {**good, "masklet": [*good["masklet"][:3], good["masklet"][3][:1]]}
    for content, what in (
        (b"", "holds 0 bytes"),
        (b"{", "not valid JSON"),
        (b"[]", "not a SA-V annotation"),
        (json.dumps({"masklet": 5}).encode(), "not a SA-V annotation"),
        (json.dumps(ragged).encode(), "not a SA-V"),
        (json.dumps({**good, "masklet": []}).encode(), "masklet_id"),
        (json.dumps({**good, "masklet": [[None, None]]}).encode(), "annotates no frame"),
        (json.dumps({**good, "masklet": good["masklet"] * 2}).encode(), "has 13 frames, .* up to frame 28"),
        (json.dumps(cut).encode(), "frame 4, object 0"),
        (json.dumps(other_size).encode(), "60 x 50, its frame 64 x 48"),
    ):
        path.write_bytes(content)
        record = open_at(tmp_path)[0]
        with pytest.raises(DataError, match=what) as error:
            [record.masks(frame) for frame in record.annotated]
        assert "sav_000001_manual.json" in str(error.value) and "exclude" in str(error.value)
    (tmp_path / "sav_000001.mp4").unlink()
    with pytest.raises(DataError, match=r"1 annotated video without an mp4 .*needs sav_000001\.mp4"):
        open_at(tmp_path)
    with pytest.raises(DataError, match=r"no \*_auto\.json in .*sav_annotations"):
        open_at(tmp_path, sav_annotations="auto")


def test_files_of_one_name_are_refused(tmp_path, write_video):
    """Masks of one would be drawn on the other."""
    for folder in ("a", "b"):
        (tmp_path / "sav").mkdir(exist_ok=True)
        write_sav(tmp_path / "sav" / folder, write_video)
    with pytest.raises(DataError, match=r"names must differ between folders, 2 do not: .*a/.* and .*b/"):
        open_at(tmp_path / "sav")
    (tmp_path / "sav/b/sav_000001_manual.json").unlink()
    with pytest.raises(DataError, match=r"1 do not: .*sav_000001\.mp4 and "):
        open_at(tmp_path / "sav")
    write_sa1b(tmp_path / "loose", 1, [square(0)])
    for number in (1, 2):
        with tarfile.open(tmp_path / "loose" / f"part{number}.tar", "w") as tar:
            for suffix in (".jpg", ".json"):
                tar.add(tmp_path / "loose" / f"sa_1{suffix}", f"sa_1{suffix}")
    for _ in ("tars and a file", "two tars"):
        with pytest.raises(DataError, match="names must differ between folders"):
            open_at(tmp_path / "loose")
        for path in (tmp_path / "loose").glob("sa_1.*"):
            path.unlink()


def test_sa1b_in_folders_and_tar_files(tmp_path):
    for number in (1, 2, 3):
        write_sa1b(tmp_path / "all" / f"sa_00000{number}", number, [square(0), square(0) * 0, square(30)])
    records = {record.name: record for record in open_at(tmp_path / "all")}
    assert list(records) == ["sa_1", "sa_2", "sa_3"]
    assert records["sa_2"].size == (HEIGHT, WIDTH) and list(records["sa_2"].annotated) == [0]
    assert list(records["sa_2"].masks(0)) == [0, 2] and (records["sa_2"].masks(0)[2] == square(30)).all()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "sa_000000.tar", "w") as tar:
        for path in sorted((tmp_path / "all").rglob("sa_*.*")):
            tar.add(path, f"./{path.name}")
    shutil.rmtree(tmp_path / "all")
    for _ in range(2):  # scanned, then through the stored index
        dataset = open_at(tmp_path / "tars")
        assert [int(record.frames([0])[0][5, 5, 0]) for record in dataset] == [1, 2, 3]
        assert [list(record.masks(0)) for record in dataset] == [[0, 2]] * 3
    assert (tmp_path / "tars" / "sa_000000.tar.members.npz").is_file()


def test_an_index_follows_its_tar(tmp_path, monkeypatch):
    write_sa1b(tmp_path / "files", 1, [square(0)])
    write_sa1b(tmp_path / "files", 2, [square(0)])
    (tmp_path / "tars").mkdir()
    for members, expected in ((("sa_1",), ["sa_1"]), (("sa_1", "sa_2"), ["sa_1", "sa_2"])):
        with tarfile.open(tmp_path / "tars" / "part.tar", "w") as tar:
            for member in members:
                for suffix in (".jpg", ".json"):
                    tar.add(tmp_path / "files" / f"{member}{suffix}", f"{member}{suffix}")
        assert [record.name for record in open_at(tmp_path / "tars")] == expected
    index = tmp_path / "tars" / "part.tar.members.npz"
    index.write_bytes(b"damaged")
    assert len(open_at(tmp_path / "tars")) == 2
    index.unlink()
    index.mkdir()  # nothing can be written there, as in a folder that is read-only
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_at(tmp_path / "tars")) == 2
    (kept,) = (tmp_path / "cache" / "sam2fast").iterdir()
    monkeypatch.setattr(tarfile, "open", None)  # the tar is not scanned again
    assert len(open_at(tmp_path / "tars")) == 2 and kept.name.startswith("part.tar.")


def test_sa1b_defects_are_named(tmp_path):
    def change(**fields):
        return lambda content: content["annotations"][0]["segmentation"].update(fields)

    cases = {
        1: (lambda content: content.clear(), r"sa_1\.json is not a SA-1B annotation"),
        2: (change(counts=""), r"sa_2\.json, annotation 0: cannot read run lengths ''"),
        3: (change(size=[HEIGHT, WIDTH + 1]), r"sa_3\.json, annotation 0: .* cover 3072 of the 48 x 65 = 3120 pixels"),
        4: (lambda content: content["annotations"].__setitem__(0, 5), r"sa_4\.json, annotation 0: .* needs `size`"),
    }
    for number, (damage, _) in cases.items():
        write_sa1b(tmp_path, number, [square(0)], damage)
    for record, (_, what) in zip(open_at(tmp_path), cases.values(), strict=True):
        with pytest.raises(DataError, match=what) as error:
            record.masks(0)
        assert "exclude" in str(error.value)
    (tmp_path / "sa_9.json").write_text("{}")
    with pytest.raises(DataError, match=r"1 annotations have no image: sa_9 .*needs sa_9\.jpg.*exclude"):
        open_at(tmp_path)
    assert len(open_at(tmp_path, exclude=("sa_9",))) == 4


def test_tar_files_that_were_cut_off(tmp_path):
    write_sa1b(tmp_path / "files", 1, [square(0)])
    path = tmp_path / "part.tar"
    with tarfile.open(path, "w") as tar:
        for suffix in (".json", ".jpg"):
            tar.add(tmp_path / "files" / f"sa_1{suffix}", f"sa_1{suffix}")
    data = path.read_bytes()
    shutil.rmtree(tmp_path / "files")
    path.write_bytes(data[:1700])
    with pytest.raises(DataError, match=r"part\.tar"):
        open_at(tmp_path)[0].frames([0])
    path.write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"cannot read .*part\.tar: .* compressed: restore or unpack"):
        open_at(tmp_path)


def test_real_sa1b_files_without_their_partners(shared_data):
    with pytest.raises(DataError, match=r"2 annotations have no image: sa_3032002, sa_560"):
        open_at(shared_data / "sa1b")
    with pytest.raises(DataError, match=r"without an mp4 .*sav_000001_manual\.json needs sav_000001\.mp4"):
        open_at(shared_data / "sav")


def test_real_coco(shared_data):
    folder = shared_data / "coco_mini_val2017"
    dataset, reference = open_at(folder), COCO(str(folder / "instances.json"))
    with_objects = {annotation["image_id"] for annotation in reference.anns.values() if not annotation["iscrowd"]}
    assert {record.image_id for record in dataset} == with_objects
    for record in list(dataset)[:20]:
        masks = record.masks(0)
        annotations = reference.loadAnns(reference.getAnnIds(record.image_id, iscrowd=False))
        expected = {annotation["id"]: reference.annToMask(annotation) for annotation in annotations}
        assert set(masks) == {k for k, mask in expected.items() if mask.any()}
        assert all((masks[k] == expected[k]).all() for k in masks)
        assert record.frames([0])[0].shape == (*record.size, 3)


def write_coco(root, annotations, size=(HEIGHT, WIDTH), image="a.jpg"):
    (root / "images").mkdir(exist_ok=True)
    assert cv2.imwrite(str(root / "images" / "a.jpg"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": image, "height": size[0], "width": size[1]}],
        "annotations": [{"id": 5 + index, "image_id": 1, **entry} for index, entry in enumerate(annotations)],
    }
    (root / "instances.json").write_text(json.dumps(content))


def test_coco_kinds_of_annotation(tmp_path):
    counts = rle(square(20))
    write_coco(
        tmp_path,
        [
            {"segmentation": [[2, 2, 12, 2, 12, 12]]},
            {"segmentation": counts, "iscrowd": 1},
            {"segmentation": counts, "iscrowd": 0},
        ],
    )
    masks = open_at(tmp_path)[0].masks(0)
    assert list(masks) == [5, 7] and (masks[7] == square(20)).all()
    as_file = open_at(tmp_path / "images", annotations=str(tmp_path / "instances.json"))
    assert list(as_file[0].masks(0)) == [5, 7]


def test_coco_defects_are_named(tmp_path):
    triangle = {"segmentation": [[2, 2, 12, 2, 12, 12]]}
    for entries, options, what in (
        ([triangle], {"size": (50, WIDTH)}, r"instances\.json, image a: the mask is 64 x 50, its frame 64 x 48"),
        ([{"segmentation": [[2, 2, 12]]}], {}, r"instances\.json, annotation 5 \(image a\): a polygon"),
        ([{"segmentation": {"size": [HEIGHT, WIDTH], "counts": "x"}}], {}, r"annotation 5 \(image a\): .* run lengths"),
        ([{}], {}, r"annotation 5 \(image a\): a polygon"),
    ):
        write_coco(tmp_path, entries, **options)
        with pytest.raises(DataError, match=what):
            open_at(tmp_path)[0].masks(0)
    write_coco(tmp_path, [triangle], image="b.jpg")
    with pytest.raises(DataError, match=r"1 of 1 images of .*instances\.json are missing: b\.jpg"):
        open_at(tmp_path)
    write_coco(tmp_path, [{**triangle, "iscrowd": 1}])
    with pytest.raises(DataError, match=r"annotates no image \(1 images, 1 annotations\)"):
        open_at(tmp_path)
    for content in ("[]", "{}", '{"images": [{}], "annotations": []}', '{"images": 3, "annotations": []}'):
        (tmp_path / "instances.json").write_text(content)
        with pytest.raises(DataError, match=r"instances\.json (is not a COCO instances file|annotates no image)"):
            open_at(tmp_path)
    shutil.copy(tmp_path / "instances.json", tmp_path / "instances_val.json")
    with pytest.raises(DataError, match=r"need one instances\*\.json .*instances\.json, .*instances_val\.json"):
        open_at(tmp_path, format="coco")


def test_values_of_any_kind_are_named(tmp_path, write_video):
    """Types and numbers that no annotation should have."""
    for fields, what in (
        ({"masklet_id": 5}, "masklet_id must be a list of whole numbers, not 5"),
        ({"masklet_id": [0, 0]}, "masklet_id has 0 more than once"),
        ({"fps": 1e-300, "video_frame_count": 1e308}, "`fps` of 1e-300"),
        ({"masklet": [[{"size": [HEIGHT, WIDTH], "counts": [2**70, 1.5]}]], "masklet_id": [0]}, "counts must be"),
    ):
        write_sav(tmp_path / "sav", write_video, **{"frames": 5, **fields})
        with pytest.raises(DataError, match=what):
            record = open_at(tmp_path / "sav")[0]
            record.masks(record.annotated[0])
    (tmp_path / "sav/sav_000001_manual.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not valid JSON"):
        len(open_at(tmp_path / "sav")[0].annotated)
    triangle = {"segmentation": [[2, 2, 12, 2, 12, 12]]}
    write_coco(tmp_path, [triangle, triangle])
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"][1]["id"] = content["annotations"][0]["id"]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has an id that another one has"):
        open_at(tmp_path, format="coco", annotations=str(tmp_path / "instances.json"))[0].masks(0)
    content["images"][0]["height"] = float("inf")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a COCO instances file"):
        open_at(tmp_path, format="coco", annotations=str(tmp_path / "instances.json"))


def test_one_pixel_is_said_once(tmp_path):
    write_coco(tmp_path, [{"segmentation": [[2, 2, 12, 2, 12, 12]]}], size=(HEIGHT, WIDTH + 1))
    dataset = open_at(tmp_path)
    with pytest.warns(UserWarning, match="the mask is 65 x 48, its frame 64 x 48"):
        assert dataset[0].masks(0)[5].shape == (HEIGHT, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset[0].masks(0)


def test_images_as_stored(tmp_path):
    """EXIF rotation is ignored: masks refer to the stored pixels."""
    from PIL import Image

    write_sa1b(tmp_path, 1, [square(0)])
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, "JPEG", exif=exif)
    (tmp_path / "sa_1.jpg").write_bytes(buffer.getvalue())
    record = open_at(tmp_path)[0]
    assert record.size == (HEIGHT, WIDTH) == record.frames([0])[0].shape[:2]
