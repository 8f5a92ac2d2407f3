from __future__ import annotations

import json
import math

import pytest

from sam2fast.telemetry.run_log import RunLog, read_log


def write_steps(run_dir, steps, resume_step=0, offset=0.0):
    log = RunLog(run_dir, resume_step=resume_step)
    for step in steps:
        log.scalars(step, {"train/loss": offset + step}, stage="images")
    log.close()


def tensorboard_points(run_dir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_values_reach_both_logs(tmp_path):
    log = RunLog(tmp_path / "run")
    log.scalars(10, {"train/loss": 2.5, "lr/base": 1e-4}, stage="video")
    log.scalars(10, {"val/davis_jf": 71.0}, stage="video")
    log.close()
    first, second = read_log(tmp_path / "run")
    assert (first["step"], first["stage"], first["train/loss"], first["lr/base"]) == (10, "video", 2.5, 1e-4)
    assert second["val/davis_jf"] == 71.0 and "train/loss" not in second
    assert first["seconds"] >= 0
    assert tensorboard_points(tmp_path / "run", "train/loss") == [(10, 2.5)]
    assert tensorboard_points(tmp_path / "run", "val/davis_jf") == [(10, 71.0)]


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(1, {"train/loss": 1.0})
    assert [line["step"] for line in read_log(tmp_path)] == [1]
    log.close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, range(10, 60, 10))
    write_steps(tmp_path, range(40, 60, 10), resume_step=30, offset=100.0)
    want = [(10, 10.0), (20, 20.0), (30, 30.0), (40, 140.0), (50, 150.0)]
    assert [(line["step"], line["train/loss"]) for line in read_log(tmp_path)] == want
    assert tensorboard_points(tmp_path, "train/loss") == want


def test_a_run_from_the_start_replaces_an_older_log(tmp_path):
    write_steps(tmp_path, (10, 20))
    write_steps(tmp_path, (10,), offset=100.0)
    assert [line["train/loss"] for line in read_log(tmp_path)] == [110.0]
    assert tensorboard_points(tmp_path, "train/loss") == [(10, 110.0)]


@pytest.mark.parametrize("cut", ['{"step": 30, "stage": "images", "tra', '{"step": 30}', "\x00\x00", "[1]"])
def test_a_line_cut_off_by_a_crash_is_no_harm(tmp_path, cut):
    write_steps(tmp_path, (10, 20))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(cut)
    assert [line["step"] for line in read_log(tmp_path)][:2] == [10, 20]
    write_steps(tmp_path, (30,), resume_step=20)
    assert [line["step"] for line in read_log(tmp_path)] == [10, 20, 30]
    for text in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(text)


def test_an_interrupted_cleanup_leaves_the_old_log_whole(tmp_path, monkeypatch):
    write_steps(tmp_path, (10, 20, 30))
    before = (tmp_path / "log.jsonl").read_text()

    def crash(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, resume_step=10)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_values_that_are_not_finite_are_gaps(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/dice_loss": 1.0})
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["train/loss"], line["train/grad_norm"], line["train/dice_loss"]) == (None, None, 1.0)


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", enabled=False)
    log.scalars(1, {"train/loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()
    assert read_log(tmp_path / "run") == []
