"""The sheet of augmentations: a row for each that is on, cells that show it, a file that is whole or not there."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from sam2fast.cli import main
from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data.formats import open_dataset
from sam2fast.data.sheet import EVERYTHING, draw_sheet

OFF = AugmentConfig(flip=0, scale=(1, 1), brightness=0, contrast=0, saturation=0, blur=0)
CELL, STEP = 256, (296, 262)
"""Pixels of a picture, and from one to the next down and to the right."""

CONFIG = """
name: sheet
model: {{size: micro, image_size: 256}}
data: {{datasets: {{mine: {{root: "{root}"}}}}}}
stages:
  - &stage
    name: one
    steps: 1
    data: [{{dataset: mine, frames: 2}}]
    prompts: {{init_frames: 1}}
    augment: {{flip: 0.5, blur: 0}}
  - {{<<: *stage, name: two, augment: {{grayscale: 0.1}}}}
"""


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = row * STEP[0], column * STEP[1]
    return sheet[top : top + CELL, left : left + CELL].astype(int)


def grid(sheet: np.ndarray) -> tuple[int, int]:
    assert sheet.shape[0] % STEP[0] == sheet.shape[1] % STEP[1] == 0
    return sheet.shape[0] // STEP[0], sheet.shape[1] // STEP[1]


def sheet_of(folder, augment, frames=3, **options):
    dataset = open_dataset(DatasetConfig(root=str(folder)), "mine", 0)
    return draw_sheet(dataset, MixItem(dataset="mine", frames=frames, **options), augment, CELL, clips=2)


def test_rows_show_what_they_say(video_folder):
    folder = video_folder({"a": 5, "b": 6, "c": 4})
    sheet = sheet_of(folder, OFF.model_copy(update={"flip": 0.3, "grayscale": 0.2, "mosaic": 0.1}), reverse=0.5)
    before, flip, gray, mosaic, together, reversal = range(6)
    assert grid(sheet) == (6, 6)
    for column in range(6):
        picture = cell(sheet, before, column)
        assert abs(cell(sheet, flip, column)[:, ::-1] - picture).mean() < 2
        off_gray = np.ptp(cell(sheet, gray, column), axis=-1)
        assert np.median(off_gray) == 0 < off_gray.max()  # the objects keep their color
        upper, lower = cell(sheet, mosaic, column)[: CELL // 2], cell(sheet, mosaic, column)[CELL // 2 :]
        small = cv2.resize(picture.astype(np.uint8), (CELL // 2, CELL // 2), interpolation=cv2.INTER_AREA).astype(int)
        for part in (*np.split(upper, 2, axis=1), *np.split(lower, 2, axis=1)):
            assert min(abs(part - small).mean(), abs(part - small[:, ::-1]).mean()) < 12
        mirror = 2 - column % 3 + 3 * (column // 3)
        assert abs(cell(sheet, reversal, column) - cell(sheet, before, mirror)).mean() < 2


def test_the_same_seed_draws_the_same_sheet(video_folder):
    folder = video_folder({"a": 5, "b": 5})
    first, second = (sheet_of(folder, EVERYTHING) for _ in range(2))
    assert (first == second).all() and grid(first) == (10, 6)
    assert grid(sheet_of(folder, OFF, frames=1)) == (2, 2)


def test_command(video_folder, tmp_path, capsys):
    folder, out = video_folder({"a": 5, "b": 5}), tmp_path / "new" / "sheet.png"
    assert main(["augmentations", "--data", str(folder), "--out", str(out), "--clips", "1"]) == 0
    assert grid(cv2.imread(str(out))) == (11, 3)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=folder))
    assert main(["augmentations", "--config", str(config), "--out", str(out), "stages.0.augment.blur=0.5"]) == 0
    assert grid(cv2.imread(str(out))) == (6, 4)
    assert main(["augmentations", "--config", str(config), "--stage", "two", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{folder}", "--out", "{config}/sheet.png"], "cannot write"),
        (["--data", "{folder}/nowhere", "--out", "{out}"], "no folder at"),
        (["--data", "{folder}", "--out", "{out}", "--clips", "0"], "--clips must be at least 1, not 0"),
        (["--data", "{folder}", "--out", "{out}", "seed=3"], "give --config in place of --data"),
        (["--config", "{config}", "--out", "{out}", "--stage", "twoo"], "no stage 'twoo'; did you mean 'two'?"),
    ],
)
def test_a_mistake_is_one_line(video_folder, tmp_path, capsys, arguments, message):
    folder, config, out = video_folder({"a": 4}), tmp_path / "config.yaml", tmp_path / "sheet.png"
    config.write_text(CONFIG.format(root=folder))
    filled = [text.format(folder=folder, config=config, out=out) for text in arguments]
    assert main(["augmentations", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 6 and not out.exists()


@pytest.mark.parametrize(
    "out, data, said", [("x.txt", "lost", "--out must be the name of a .png"), ("x.png", "", "empty")]
)
def test_mistakes_are_said_before_any_work(out, data, said, tmp_path, capsys):
    assert main(["augmentations", "--data", data, "--out", str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
