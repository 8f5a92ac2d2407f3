from __future__ import annotations

import io
import re
from types import SimpleNamespace

from rich.console import Console

from sam2fast.telemetry.progress import Progress

VALUES = {"train/loss": 12.345678, "lr/base": 3e-4, "perf/samples_per_s": 5.25}


def pipe():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_off_a_terminal_every_report_is_one_plain_line():
    console = pipe()
    progress = Progress(total=100, console=console, interval=0.0)
    progress.update(10, "images", VALUES)
    progress.update(20, "images", {"train/loss": 11.0})
    progress.close()
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("images  step 10/100  loss 12.35  lr 3.00e-04  5.25 samples/s  ETA 0:0")
    assert "step 20/100  loss 11  lr 3.00e-04  5.25 samples/s" in second  # the last known values stay


def test_plain_lines_keep_their_distance_but_the_last_always_comes():
    console = pipe()
    progress = Progress(total=5, console=console, interval=3600.0)
    for step in range(1, 6):
        progress.update(step, "video", VALUES)
    lines = console.file.getvalue().splitlines()
    assert [re.search(r"step (\d)/5", line).group(1) for line in lines] == ["1", "5"]


def test_the_remaining_time_counts_the_steps_of_this_process(monkeypatch):
    clock = iter([100.0, 110.0, 110.0])  # start, estimate, line
    monkeypatch.setattr("sam2fast.telemetry.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = pipe()
    progress = Progress(total=100, start=50, console=console, interval=0.0)
    progress.update(60, "joint", {})
    assert "ETA 0:00:40" in console.file.getvalue()


def test_on_a_terminal_there_is_a_bar():
    console = terminal()
    progress = Progress(total=100, console=console)
    progress.update(42, "images", VALUES)
    progress.message("validating")
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "42/100" in shown
    assert "loss 12.35  lr 3.00e-04  5.25 samples/s" in shown
    assert "validating" in shown


def test_messages_are_shown_as_they_are():
    console = pipe()
    Progress(total=1, console=console).message("samples [a/b@0,1] were skipped: " + "x" * 60)
    assert console.file.getvalue() == "samples [a/b@0,1] were skipped: " + "x" * 60 + "\n"


def test_other_ranks_show_nothing():
    for console in (pipe(), terminal()):
        progress = Progress(total=1, enabled=False, console=console)
        progress.update(1, "images", VALUES)
        progress.message("hello")
        progress.close()
        assert console.file.getvalue() == ""
