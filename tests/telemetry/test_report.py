from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sam2fast.telemetry.bad_data import BadDataLog, Listed, read_bad_data
from sam2fast.telemetry.report import summarize, write_curves


def write_log(run_dir, lines):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(step, stage, seconds=1.0, **values):
    return {
        "step": step,
        "stage": stage,
        "seconds": seconds,
        **{f"train/{name}": value for name, value in values.items()},
    }


def validation(step, stage, **values):
    return {"step": step, "stage": stage, "seconds": 2.0, **{f"val/{name}": value for name, value in values.items()}}


@pytest.fixture
def run_dir(tmp_path):
    losses = {10: 9.0, 20: 4.0, 30: 5.0}
    lines = [
        line(s, "images", loss=v, focal_loss=v / 20, dice_loss=v / 2, temporal_loss=0.0) for s, v in losses.items()
    ]
    lines.append(validation(30, "images", davis_jf=50.0, davis_jf_baseline=45.5))
    lines += [
        line(s, "video", seconds=3600.0, loss=v, temporal_loss=0.1) for s, v in ((40, 8.0), (50, None), (60, 3.0))
    ]
    lines.append(validation(60, "video", davis_jf=61.25, davis_jf_baseline=45.5, coco_map=31.0))
    write_log(tmp_path / "run", lines)
    return tmp_path / "run"


def shown(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def cells(text, start):
    row = next(row for row in text.splitlines() if row.strip("\u2502 ").startswith(start))
    return [cell.strip() for cell in row.strip().strip("\u2502").split("\u2502")]


def test_the_summary_counts_steps_time_and_losses_of_each_stage(run_dir):
    text = shown(summarize(run_dir))
    assert cells(text, "images") == ["images", "30", "0:00:05", "9", "5", "4", "20"]
    assert cells(text, "video") == ["video", "30", "3:00:02", "8", "3", "3", "60"]


def test_the_summary_sets_metrics_beside_their_baselines(run_dir):
    text = shown(summarize(run_dir))
    assert cells(text, "val/davis_jf") == ["val/davis_jf", "50", "61.25", "61.25", "60", "45.5", "+15.75"]
    assert cells(text, "val/coco_map") == ["val/coco_map", "31", "31", "31", "60", "", ""]


def test_the_summary_names_the_files_that_exist(run_dir):
    (run_dir / "export").mkdir()
    text = shown(summarize(run_dir))
    assert str(run_dir / "export") in text and str(run_dir / "log.jsonl") in text
    assert "checkpoints" not in text


def test_curves_are_png_files_of_some_size(run_dir):
    import cv2

    paths = write_curves(run_dir)
    assert paths == [run_dir / "curves" / "losses.png", run_dir / "curves" / "metrics.png"]
    for path in paths:
        image = cv2.imread(str(path))
        assert image.shape[0] > 300 and image.shape[1] > 500
        assert (image < 250).any(-1).mean() > 0.01  # something is drawn
    assert sorted(path.name for path in (run_dir / "curves").iterdir()) == ["losses.png", "metrics.png"]


def test_curves_of_a_run_without_validation_are_losses_alone(tmp_path):
    write_log(tmp_path, [line(10, "images", loss=1.0)])
    assert [path.name for path in write_curves(tmp_path)] == ["losses.png"]


@pytest.mark.parametrize("lines", [[], [line(10, "images", loss=None)], [validation(0, "", davis_jf=None)]])
def test_a_run_without_numbers_can_be_reported(tmp_path, lines):
    write_log(tmp_path, lines)
    write_curves(tmp_path)
    assert "log.jsonl" in shown(summarize(tmp_path))


def test_a_folder_without_a_log_can_be_reported(tmp_path):
    assert write_curves(tmp_path) == []
    shown(summarize(tmp_path))


def test_data_that_could_not_be_used_is_listed_once_and_counted(run_dir):
    log = BadDataLog(run_dir)
    assert "could not be used" not in shown(summarize(run_dir)) and not log.path.exists()
    entries = [Listed("sa1b", f"sa_{number}", f"cannot decode sa_{number}.jpg [cut off]") for number in range(25)]
    log.write(entries[:1])
    log.write(entries[:24])
    BadDataLog(run_dir, first=False).write(entries[23:])  # another rank
    with log.path.open("a") as file:
        file.write('{"dataset": "sa1b", "na')  # killed while it wrote
    assert read_bad_data(run_dir) == entries
    text = shown(summarize(run_dir))
    assert "25 of sa1b" in text and "and 5 more" in text
    assert cells(text, "sa1b") == ["sa1b", "sa_0", "cannot decode sa_0.jpg [cut off]"]
    more = Listed("sav", "b", "after a resume")
    BadDataLog(run_dir, resuming=True).write([*entries, more])
    assert read_bad_data(run_dir) == [*entries, more]
    BadDataLog(run_dir)
    assert not read_bad_data(run_dir)
