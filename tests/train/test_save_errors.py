"""A disk that is full, or a folder that cannot be written: one error, all ranks end, what was saved before stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FORKED, TRAIN, TWO_FORKED, command, losses, run
from forked import Launch, environment

WAITING = "checkpoint.asynchronous=false"

SCRIPT = f"""
import errno, os, resource, runpy, signal
import torch

save, rank, way = torch.save, os.environ["FAILING_RANK"], os.environ["FAILING_WAY"]
folder = os.environ["FAILING_FOLDER"]

def failing(value, file, *args, **kwargs):
    # a path, or a stream of torch.distributed.checkpoint
    path = str(file if isinstance(file, os.PathLike) else getattr(getattr(file, "raw", file), "name", file))
    if os.environ["RANK"] != rank or folder not in path:
        return save(value, file, *args, **kwargs)
    if way == "kill":
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "error":
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        return save(value, file, *args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

torch.save = failing
runpy.run_path({TRAIN!r}, run_name="__main__")
"""
"""Training on a disk that is full for one rank: by an error of torch.save, or by a limit on sizes of files. Or the rank
is killed as it writes."""


def codes_and_errors(
    arguments: list[str], tmp_path: Path, folder: str, rank: int, way: str
) -> tuple[list[int], str, str]:
    script = tmp_path / "failing.py"
    script.write_text(SCRIPT)
    variables = {"FAILING_RANK": str(rank), "FAILING_WAY": way, "FAILING_FOLDER": folder}
    launch = Launch([str(script), *arguments[3:]], int(arguments[1]), tmp_path, {**environment(), **variables})
    done = launch.wait(150)
    return launch.codes, done.stderr, done.stdout


@pytest.mark.parametrize(
    "rank, way, overrides",
    [
        (0, "limit", []),
        (1, "error", ["engine.zero_stage=2"]),
        pytest.param(1, "error", ["engine.zero_stage=1", WAITING], marks=pytest.mark.exhaustive),
    ],
    ids=["torch-0", "zero-1", "zero-1-waiting"],
)
def test_a_full_disk_ends_all_ranks_with_one_error(
    rank: int, way: str, overrides: list[str], tmp_path: Path, exact_config: Path, synthetic: Path
) -> None:
    output = tmp_path / "run"
    arguments = command(TWO_FORKED, exact_config, synthetic, output, "checkpoint.every=1", *overrides)
    codes, errors, printed = codes_and_errors(arguments, tmp_path, "step_00000002", rank, way)
    assert codes == [2, 2], errors[-3000:]
    assert "Traceback" not in errors and errors.count("error: ") == 1, errors[-3000:]
    reason = "could not be written to its end" if way == "limit" else "No space left on device"
    for text in (f"[rank {rank}] error: cannot save the checkpoint of step 2", "step_00000002", reason, "free space"):
        assert text in errors, errors[-3000:]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000001"]
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0 and "continuing at step 1" in done.stdout, done.stderr[-3000:]
    assert list(losses(output)) == [1, 2, 3, 4]


def test_a_rank_killed_as_it_writes(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    arguments = command(TWO_FORKED, exact_config, synthetic, output, "checkpoint.every=1")
    codes, errors, printed = codes_and_errors(arguments, tmp_path, "step_00000002", 1, "kill")
    assert codes[1] == -9 and codes[0], errors[-3000:]
    found = {path.name for path in (output / "checkpoints").iterdir()}
    assert found == {"step_00000001", ".step_00000002.partial"}
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0 and "continuing at step 1" in done.stdout, done.stderr[-3000:]
    assert list(losses(output)) == [1, 2, 3, 4]
    assert not list((output / "checkpoints").glob(".*"))


def test_a_full_disk_at_the_end_of_a_stage(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    arguments = command(FORKED, exact_config, synthetic, output, "checkpoint.every=3")
    codes, errors, _ = codes_and_errors(arguments, tmp_path, "/stages/", 0, "limit")
    assert codes == [2] and "Traceback" not in errors, errors[-3000:]
    assert "error: cannot save the weights of stage video" in errors
    assert not list((output / "stages").iterdir())
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0 and "continuing at step 3" in done.stdout, done.stderr[-3000:]


def test_a_file_in_place_of_the_folder(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "checkpoints").write_text("")
    done = run(command(TWO_FORKED, exact_config, synthetic, output, "checkpoint.every=1"), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert f"cannot save the checkpoint of step 1 to {output / 'checkpoints'}" in done.stderr


def test_a_log_that_cannot_be_written(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "log.jsonl").symlink_to("/dev/full")
    done = run(command(FORKED, exact_config, synthetic, output), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "error: cannot write to output_dir: No space left on device" in done.stderr
