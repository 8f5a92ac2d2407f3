"""Ranks that differ, come late, die or run out of memory: all of them end, and one message says which rank and why."""

from __future__ import annotations

import re
import time
from pathlib import Path
from subprocess import DEVNULL, Popen

import psutil
import pytest
import torch
from conftest import REPOSITORY, TORCHRUN, TWO_FORKED, command, losses, run, train
from forked import Launch, environment, kill

FAULTY = str(REPOSITORY / "tests" / "train" / "faulty_train.py")


def launch(fault: str, config: Path, synthetic: Path, output: Path, *overrides: str) -> Launch:
    """Two ranks, one of them with a fault (see faulty_train.py)."""
    arguments = command(TWO_FORKED, config, synthetic, output, *overrides)
    variables = {"FAULT": fault, "FAULT_ONCE": str(output.parent / "once")}
    return Launch([FAULTY, *arguments[3:]], 2, output.parent, {**environment(), **variables})


def errors_of(started: Launch) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines with an error; there are no tracebacks."""
    done = started.wait(300)
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    return started.codes, [line for line in done.stderr.splitlines() if "error: " in line]


def test_ranks_with_other_settings_do_not_start(exact_config: Path, synthetic: Path, tmp_path: Path) -> None:
    codes, errors = errors_of(launch("seed:1:0", exact_config, synthetic, tmp_path / "run"))
    assert codes == [2, 2] and len(errors) == 1
    assert "[rank 0] error: ranks were started differently: seed is 0 on rank 0 and 12345 on rank 1." in errors[0]
    assert not (tmp_path / "run").exists()


def test_ranks_that_draw_different_prompts_end_before_the_step(
    exact_config: Path, synthetic: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    codes, errors = errors_of(launch("plan:1:2", exact_config, synthetic, output))
    assert codes == [2, 2] and len(errors) == 1
    assert "rollout.mode is 'mask' on rank 0 and 'point' on rank 1" in errors[0], errors
    assert "step is" not in errors[0]
    assert max(losses(output)) <= 2  # the third step was not begun


def test_out_of_memory_says_what_to_change(exact_config: Path, synthetic: Path, tmp_path: Path) -> None:
    batch = "stages.0.data.0.batch_size=2"
    codes, errors = errors_of(launch("memory:1:1", exact_config, synthetic, tmp_path / "run", batch))
    assert codes == [1, 2] and len(errors) == 2
    (own,) = [line for line in errors if line.startswith("[rank 1]")]
    (other,) = [line for line in errors if line.startswith("[rank 0]")]
    for text in (
        "out of memory in step 2 (stage 'video', dataset 'videos')",
        "2 clips of 3 frames at 64 pixels",
        "GiB (computed, with 2 objects a clip)",
        "model.recompute=decoder+trunk+selective (",
        "stages.0.data.0.batch_size=1 with stages.0.accumulate=2 (the same update); ",
        "stages.0.data.0.max_objects=1; precision=bfloat16; ",
    ):
        assert text in own, own
    assert "rank 1 (process" in other and "its own error: out of memory in step 2" in other


def test_a_rank_that_is_killed_is_named(exact_config: Path, synthetic: Path, tmp_path: Path) -> None:
    codes, errors = errors_of(launch("kill:1:1", exact_config, synthetic, tmp_path / "run"))
    assert codes == [1, -9] and len(errors) == 1
    assert (
        "rank 1 (process" in errors[0] and "when it was last seen, does not answer any more: it was killed" in errors[0]
    ), errors
    assert "after step 1 of stage 'video'" in errors[0] and "continues from the last checkpoint" in errors[0]


def test_a_rank_that_stalls_is_named_while_the_others_wait(exact_config: Path, synthetic: Path, tmp_path: Path) -> None:
    started = launch("stall:1:1", exact_config, synthetic, tmp_path / "run", "engine.stall_minutes=0.05")
    deadline, named = time.monotonic() + 200, []
    try:
        while not named:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
            printed = "".join(path.read_text() for path in Path(started.folder.name).glob("stderr.*"))
            named = [line for line in printed.splitlines() if "watchdog: " in line and "in loading data" in line]
    finally:
        kill(started.pids)
        started.waiting.join()
    assert "rank 1 (process" in named[0] and "in loading data, after step 1 of stage 'video' is late" in named[0]
    assert "rank 0 waits in" in named[0] and "no progress for" in named[0]


@pytest.mark.slow
def test_torchrun_starts_ranks_again_and_they_end_with_the_same_weights(
    exact_config: Path, synthetic: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "killed"
    often = "checkpoint.every=1"
    train(TWO_FORKED, exact_config, synthetic, whole, often)
    arguments = command([*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1"], exact_config, synthetic, output, often)
    arguments = [FAULTY if argument.endswith("train.py") else argument for argument in arguments]
    done = run(arguments, cwd=tmp_path, FAULT="kill:1:3", FAULT_ONCE=str(tmp_path / "once"))
    assert done.returncode == 0 and (tmp_path / "once").exists(), done.stderr[-3000:]
    assert re.search("continuing at step [1-3] ", done.stdout)  # perhaps the last checkpoint was being written
    want, got = (torch.load(folder / "export" / "model.pt", weights_only=True)["model"] for folder in (whole, output))
    assert not [name for name in want if not torch.equal(want[name], got[name])]
    assert losses(output) == losses(whole)


def test_ranks_whose_launcher_is_gone_save_and_end(exact_config: Path, synthetic: Path, tmp_path: Path) -> None:
    """Both ranks of a torchrun that is killed with nothing else."""
    output = tmp_path / "run"
    arguments = command([*TORCHRUN, "--nproc_per_node=2"], exact_config, synthetic, output, "stages.0.steps=100000")
    launcher = Popen(arguments, cwd=tmp_path, env=environment(), stdout=DEVNULL, stderr=DEVNULL)
    deadline = time.monotonic() + 200
    while not ((output / "log.jsonl").is_file() and losses(output)):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    for process in alive:
        process.kill()
    assert not alive
    assert list((output / "checkpoints").glob("step_*"))
