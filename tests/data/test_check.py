"""check-data: what it counts, what it finds, and that the configuration it prints trains."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sam2fast import cli
from sam2fast.config_file import load_config
from sam2fast.data.check import check_data, command, dataset_config
from sam2fast.data.formats import open_dataset
from sam2fast.data.sampling import ClipDataset
from sam2fast.data.synthetic import write_dataset

ITEMS = {"video_folder": 3, "sav": 4, "sa1b": 6, "coco": 6}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset in each format."""
    root = tmp_path_factory.mktemp("written")
    for layout, count in ITEMS.items():
        write_dataset(root / layout, layout, count, seed=1, frames=9, size=(96, 128))
    return root


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def check(root: Path, out: Path, *options: str) -> tuple[int, dict]:
    """Run the command; its exit code and report."""
    code = cli.main(["check-data", str(root), "--out", str(out), "--workers", "1", *options])
    return code, json.loads((out / "report.json").read_text())


def samples(config_path: Path) -> list[str]:
    """Ids of one pass over the dataset of a configuration."""
    config = load_config(config_path)
    item = config.stages[0].data[0]
    dataset = open_dataset(config.data.datasets[item.dataset], item.dataset, seed=0)
    clips = ClipDataset(dataset, item, config.stages[0].augment, image_size=64, seed=0)
    return [clips[number].sample_id for number in range(len(clips))]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reasons(report: dict, warnings: bool = False) -> dict[str, str]:
    """All reasons of each item in one text."""
    found: dict[str, str] = {}
    for defect in report["defects"]:
        if defect["is_warning"] == warnings:
            found[defect["item"]] = f"{found.get(defect['item'], '')}{defect['kind']}: {defect['reason']}\n"
    return found


@pytest.mark.parametrize("layout", ITEMS)
def test_what_it_prints_can_be_used(written, tmp_path, capsys, layout):
    code, report = check(written / layout, tmp_path / "out")
    printed = capsys.readouterr().out
    assert code == 0 and report["format"] == layout and "no defects" in printed
    assert report["total"] == report["checked"] == report["sound"] == ITEMS[layout]
    config = tmp_path / "out" / "config.yaml"
    assert printed.endswith(f"trains on it:\n\n{config.read_text()}\n")
    ids = {text.partition("@")[0] for text in samples(config)}
    assert len(ids) == ITEMS[layout] and all(text.startswith(f"{layout}/") for text in ids)


def test_what_it_prints_trains(written, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # and again after the test
    check(written / "coco", tmp_path / "out")
    small = ["model.size=micro", "model.image_size=64", "device=cpu", "data.workers=0", "stages.0.steps=1"]
    small += [f"output_dir={tmp_path / 'run'}", "stages.0.data.0.max_objects=1", "stages.0.prompts.correction_clicks=0"]
    assert cli.train(str(tmp_path / "out" / "config.yaml"), small) == 0
    assert (tmp_path / "run" / "export" / "model.pt").is_file()


def test_counts(written, tmp_path):
    _, report = check(written / "sav", tmp_path / "out")
    annotations = [json.loads(path.read_text()) for path in sorted((written / "sav").glob("*_manual.json"))]
    areas = [[[_area(rle) for rle in frame] for frame in content["masklet"]] for content in annotations]
    visible = [np.array(video) > 0 for video in areas]
    assert report["frames"] == 4 * 33 and report["annotated"] == 4 * 9
    assert report["masks"] == sum(int(video.sum()) for video in visible)
    assert report["empty_masks"] == sum(int((~video).sum()) for video in visible)
    assert report["masklets"] == sum(int(video.any(0).sum()) for video in visible)
    assert report["tiny_masks"] == sum(
        0 < area * 1024 * 1024 / (96 * 128) < 64 for video in areas for frame in video for area in frame
    )
    assert report["sizes"] == [{"width": 128, "height": 96, "items": 4}]
    assert report["frame_rates"] == {"24.0": 4} and report["annotated_frames"] == {"9": 4}


def test_a_second_format_in_the_folder_is_a_warning(data, tmp_path):
    shutil.copytree(data / "sa1b", data / "sav", dirs_exist_ok=True)
    code, report = check(data / "sav", tmp_path / "out", "--format", "sav")
    assert code == 0 and report["total"] == ITEMS["sav"]
    assert re.search("read as sav and also holds what looks like sa1b", reasons(report, warnings=True)[""])


def test_annotations_that_end_early_are_a_warning(data, tmp_path):
    path = sorted((data / "sav").glob("*_manual.json"))[0]
    content = json.loads(path.read_text())
    content["masklet"] = content["masklet"][:4]
    path.write_text(json.dumps(content))
    code, report = check(data / "sav", tmp_path / "out")
    found = reasons(report, warnings=True)
    name = path.name.removesuffix("_manual.json")
    assert code == 0 and "has 33 frames and is annotated up to frame 12" in found[name] and len(found) == 1


def test_damage_that_decoding_hides_is_a_warning(data, tmp_path):
    path = sorted((data / "video_folder").rglob("*.jpg"))[0]
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = b"\xff\x00" * 20
    path.write_bytes(content)
    code, report = check(data / "video_folder", tmp_path / "out")
    found = reasons(report, warnings=True)
    assert code == 0 and re.search("decoded with damage: .*, frame 0: .*JPEG", found[path.parent.name])


@pytest.mark.parametrize("lost", ["Annotations", "JPEGImages"])
def test_half_of_a_video_folder(data, tmp_path, capsys, lost):
    shutil.rmtree(data / "video_folder" / lost)
    assert cli.main(["check-data", str(data / "video_folder"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{lost} is missing" in error and "SA-1B" not in error


def _area(rle: dict) -> int:
    from pycocotools import mask

    return int(mask.area(rle))


def test_objects_that_vanish(video_folder, tmp_path, capsys):
    root = video_folder({"a": 9, "b": 5})  # object 2 is there in even frames only
    empty = np.zeros((40, 60), np.uint8)
    for path in (root / "Annotations" / "b").iterdir():
        cv2.imwrite(str(path), empty)
    code, report = check(root, tmp_path / "out")
    assert code == 0 and (report["masklets"], report["returning"], report["seen_once"]) == (2, 1, 0)
    assert report["objects_per_frame"] == {"0": 5, "1": 4, "2": 5}
    assert report["annotated_frames"] == {"5": 1, "9": 1}
    assert "without any visible object" in reasons(report, warnings=True)["b"]
    assert "1 too short for 8 frames, 2 too short for 16" in capsys.readouterr().out


def test_defects_of_video_folders(data, tmp_path):
    root = data / "video_folder"
    for name in ("d", "e", "f", "g"):
        for part in ("JPEGImages", "Annotations"):
            shutil.copytree(root / part / "scene00000", root / part / name)
    for number in (2, 7):
        cut(root / "JPEGImages" / "scene00000" / f"{number:05d}.jpg")
    cut(root / "Annotations" / "scene00000" / "00001.png")
    (root / "JPEGImages" / "scene00001" / "00004.jpg").unlink()
    (root / "JPEGImages" / "scene00001" / "00008.jpg").unlink()
    shutil.copy(root / "JPEGImages" / "d" / "00003.jpg", root / "JPEGImages" / "d" / "3.jpg")
    _resize(root / "Annotations" / "e" / "00005.png", 1, 0)
    _resize(root / "Annotations" / "e" / "00006.png", 0, 9)
    _resize(root / "JPEGImages" / "e" / "00007.jpg", 9, 9)
    shutil.rmtree(root / "JPEGImages" / "f")
    shutil.rmtree(root / "Annotations" / "g")
    code, report = check(root, tmp_path / "out")
    found, warned = reasons(report), reasons(report, warnings=True)
    assert code == 1 and set(found) == {"scene00000", "scene00001", "d", "e", "f"} and set(warned) == {"e", "g"}
    assert all(name in found["scene00000"] for name in ("00002.jpg", "00007.jpg", "00001.png"))
    assert all(f"mask {root}/Annotations/scene00001/{name}" in found["scene00001"] for name in ("00004", "00008"))
    assert "d/00003.jpg and 3.jpg have the same number" in found["d"]
    assert found["e"].count("sizes that differ") == 2 and "00006.png" in found["e"] and "00007.jpg" in found["e"]
    assert "masks without frames" in found["f"]
    assert "00005.png: the mask is 129 x 96" in warned["e"] and "has no masks" in warned["g"]
    ids = samples(tmp_path / "out" / "config.yaml")
    assert [text.partition("@")[0] for text in ids] == ["video_folder/scene00002"]


def _resize(path: Path, wider: int, higher: int) -> None:
    """Add columns and rows to an image; a palette image keeps its numbers."""
    image = Image.open(path)
    image.crop((0, 0, image.width + wider, image.height + higher)).save(path)


def test_defects_of_sav(data, tmp_path):
    root = data / "sav"
    cut(root / "sav_000001.mp4")
    path = root / "sav_000002_manual.json"
    content = json.loads(path.read_text())
    for frame in (1, 2):
        assert _area(content["masklet"][frame][0])
        content["masklet"][frame][0]["counts"] = content["masklet"][frame][0]["counts"][:3]
    path.write_text(json.dumps(content))
    (root / "sav_000003.mp4").unlink()
    code, report = check(root, tmp_path / "out")
    found = reasons(report)
    assert code == 1 and set(found) == {"sav_000001", "sav_000002", "sav_000003"}
    assert found["sav_000001"].count("\n") == 1 and "sav_000001.mp4" in found["sav_000001"]
    assert all(f"frame {frame}, object 0" in found["sav_000002"] for frame in (4, 8))
    assert "sav_000003_manual.json needs sav_000003.mp4" in found["sav_000003"]
    assert [text.partition("@")[0] for text in samples(tmp_path / "out" / "config.yaml")] == ["sav/sav_000004"]


def test_defects_of_images(data, tmp_path):
    root = data / "sa1b"
    cut(root / "sa_1.jpg")
    path = root / "sa_2.json"
    content = json.loads(path.read_text())
    count = len(content["annotations"])
    for annotation in content["annotations"][1:]:
        annotation["segmentation"]["size"][0] += 1
    path.write_text(json.dumps(content))
    (root / "sa_3.jpg").unlink()
    (root / "sa_4.json").unlink()
    code, report = check(root, tmp_path / "sa1b")
    found = reasons(report)
    assert code == 1 and set(found) == {"sa_1", "sa_2", "sa_3"} and count > 2
    assert all(f"sa_2.json, annotation {number}:" in found["sa_2"] for number in range(1, count))
    assert "sa_4.jpg has no sa_4.json" in reasons(report, warnings=True)["sa_4"]
    with tarfile.open(root / "part.tar", "w") as tar:
        for path in sorted(root.glob("sa_[56].*")):
            tar.add(path, path.name)
            path.unlink()
    (root / "other.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    _, report = check(root, tmp_path / "tar")
    assert report["sound"] == 2 and f"cannot read {root / 'other.tar'}" in reasons(report)[""]

    root = data / "coco"
    path = root / "instances.json"
    content = json.loads(path.read_text())
    first, second = (content["images"][index]["id"] for index in (0, 1))
    for annotation in content["annotations"]:
        if annotation["image_id"] == first:
            annotation["segmentation"] = [[0, 0, 1]]
    path.write_text(json.dumps(content))
    (root / "images" / content["images"][1]["file_name"]).unlink()
    code, report = check(root, tmp_path / "coco")
    found, broken = reasons(report), sum(entry["image_id"] == first for entry in content["annotations"])
    assert code == 1 and set(found) == {f"{first:012d}", f"{second:012d}"}
    assert found[f"{first:012d}"].count("a polygon must list x, y pairs") == broken > 1
    assert len(samples(tmp_path / "coco" / "config.yaml")) == ITEMS["coco"] - 2


def test_the_list_on_screen_is_capped(data, tmp_path, capsys):
    for path in (data / "sa1b").glob("*.json"):
        path.write_text("{")
    code, report = check(data / "sa1b", tmp_path / "out")
    printed = capsys.readouterr().out
    assert code == 1 and len(report["defects"]) == 6 and "nothing to train on" in printed
    assert printed.count("is not valid JSON") == 5 and "and 1 more image\n" in printed
    assert (tmp_path / "out" / "report.txt").read_text().count("is not valid JSON") == 6
    assert (tmp_path / "out" / "config.yaml").read_text() == ""


def test_a_random_sample(written, tmp_path, capsys):
    reports = [check(written / "coco", tmp_path / "out", "--limit", "2")[1] for _ in range(2)]
    assert reports[0] == reports[1] and (reports[0]["checked"], reports[0]["total"]) == (2, ITEMS["coco"])
    assert "a random sample of 2 of 6 images (seed 0)" in capsys.readouterr().out
    assert "# 4 images have not been checked" in (tmp_path / "out" / "config.yaml").read_text()


def test_worker_processes_find_the_same(data, tmp_path):
    cut(data / "sa1b" / "sa_2.jpg")
    config = dataset_config(str(data / "sa1b"))
    assert [check_data(config, tmp_path / f"{workers}", workers=workers) for workers in (1, 2)] == [1, 1]
    assert (tmp_path / "1" / "report.json").read_text() == (tmp_path / "2" / "report.json").read_text()
    assert (tmp_path / "1" / "sheet.png").read_bytes() == (tmp_path / "2" / "sheet.png").read_bytes()


def test_an_interruption_shows_what_was_found(data, tmp_path, capsys, monkeypatch):
    cut(data / "sa1b" / "sa_1.jpg")

    class Interrupted(command.Inspector):
        def __getitem__(self, index):
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    monkeypatch.setattr(command, "Inspector", Interrupted)
    code, report = check(data / "sa1b", tmp_path / "out")
    assert code == 130 and report["checked"] == 3 and set(reasons(report)) == {"sa_1"}
    assert "interrupted: what was found in 3 of 6" in capsys.readouterr().out


def test_a_wrong_path(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing")
    for path, what in ((tmp_path, "cannot recognize the format"), (tmp_path / "lost", "no folder at")):
        assert cli.main(["check-data", str(path)]) == 2
        assert what in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "rows", "columns"), [("video_folder", 3, 6), ("coco", 1, 6)])
def test_contact_sheet(written, tmp_path, layout, rows, columns):
    check(written / layout, tmp_path)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    height, width = 8 + 192 + 22, 8 + 256
    assert sheet.shape == (8 + rows * height, 8 + columns * width, 3)
    saturation = cv2.cvtColor(sheet, cv2.COLOR_BGR2HSV)[..., 1]
    for row in range(rows):
        for column in range(columns):
            tile = saturation[8 + row * height : (row + 1) * height, 8 + column * width : (column + 1) * width]
            assert (tile[:192] > 150).any(), (row, column)  # a mask; the image itself is nearly gray
    assert not list(tmp_path.glob(".*"))


def test_real_data(shared_data, tmp_path):
    code, report = check(shared_data / "davis2017_judo_multi", tmp_path / "judo")
    warned = reasons(report, warnings=True)["judo"]
    assert code == 0 and report["annotated"] == report["masklets"] == report["seen_once"] == 4
    assert "00005.png: the mask is 853 x 480, its frame 854 x 480" in warned and "in a single frame" in warned
    code, report = check(shared_data / "sav", tmp_path / "sav")
    assert code == 1 and "needs sav_000001.mp4" in reasons(report)["sav_000001"]
    code, report = check(shared_data / "sa1b", tmp_path / "sa1b")
    assert code == 1 and set(reasons(report)) == {"sa_560", "sa_3032002"}
    code, report = check(shared_data / "coco_mini_val2017", tmp_path / "coco")
    assert code == 0 and (report["sound"], report["masks"]) == (79, 619)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([""], "PATH is empty; give the folder of a dataset"),
        (["notes"], "cannot recognize the format of .*; set --format, or PATH to a folder"),
        (["notes", "--annotations", "lost"], "no annotations at lost; correct --annotations, .* lie in PATH"),
        (["notes", "--format", "sav"], r"no \*_manual\.json or \*_auto\.json in .*; correct PATH \(and --annotations"),
        (["notes", "--format", "coco"], r"need one instances\*\.json .*; set --annotations to the JSON file"),
        (["images"], r"a\.jpg has no annotation, .*; put a\.json beside it \(SA-1B\) or set --annotations"),
    ],
)
def test_mistakes_are_told_in_its_own_words(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("notes/notes.txt", "images/a.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("nothing")
    assert cli.main(["check-data", *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and not re.search("`(root|format|annotations|sav_annotations)`", err)


def test_one_error_is_not_several(data, tmp_path, capsys):
    cut(next((data / "sa1b").rglob("*.jpg")))
    check(data / "sa1b", tmp_path / "out")
    assert "all of this, 1 error and 0 warnings" in capsys.readouterr().out


def test_what_coco_lists_twice_or_not_at_all(data, tmp_path):
    path = next((data / "coco").rglob("instances*.json"))
    content = json.loads(path.read_text())
    content["annotations"][0]["image_id"] = 99999
    content["images"].append(dict(content["images"][1]))
    path.write_text(json.dumps(content))
    _, report = check(data / "coco", tmp_path / "out")
    kinds = {defect["kind"] for defect in report["defects"] if defect["is_warning"]}
    assert kinds >= {"images that are listed twice", "annotations of no image"}
    assert "99999" in reasons(report, warnings=True)[""]


def test_images_without_objects_are_nothing_to_train_on(data, tmp_path, capsys):
    for path in (data / "sa1b").rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    check(data / "sa1b", tmp_path / "out")
    assert "nothing to train on" in capsys.readouterr().out


def test_tars_that_are_cut_off(data, tmp_path, capsys):
    """Beside a whole one, and alone."""
    images = sorted((data / "sa1b").rglob("sa_*.*"))
    (tmp_path / "tars").mkdir()
    for name, members in (("a", images[:4]), ("b", images[4:])):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for member in members:
                tar.add(member, member.name)
    broken = tmp_path / "tars" / "b.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    _, report = check(tmp_path / "tars", tmp_path / "out")
    assert "files that cannot be read: cannot read" in reasons(report)[""] and "b.tar" in reasons(report)[""]
    (tmp_path / "tars" / "a.tar").unlink()
    assert cli.main(["check-data", str(tmp_path / "tars"), "--out", str(tmp_path / "out")]) == 2
    assert "b.tar" in capsys.readouterr().err
