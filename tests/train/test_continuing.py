"""What a run makes of what it finds: damaged checkpoints, changed settings, and what it cannot continue."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import FORKED, TWO_FORKED, command, kill_at, losses, run
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sam2fast.models.official import from_official

FILE = "__0_0.distcp"
"""What the first rank writes of a checkpoint."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, exact_config: Path, synthetic: Path) -> Path:
    """A run that was killed at step 3, with a checkpoint of each step, the last two of them."""
    output = tmp_path_factory.mktemp("killed") / "run"
    every = ["checkpoint.every=1", "checkpoint.asynchronous=false"]
    kill_at(command(FORKED, exact_config, synthetic, Path(output.name), *every), output, 3)
    return output


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """A copy of that run, in a folder of the same name."""
    return Path(shutil.copytree(killed, tmp_path / killed.name))


def test_a_half_written_checkpoint_is_not_used(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    overrides = ["checkpoint.every=2", "checkpoint.asynchronous=false"]
    arguments = command(FORKED, exact_config, synthetic, output, *overrides)
    kill_at(arguments, output, 3)  # the checkpoint of step 2 is whole by then
    checkpoints = output / "checkpoints"
    partial = checkpoints / ".step_00000004.partial"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / FILE).write_bytes(b"half")
    (partial / "state.json").write_text('{"state": {"step": 3, "global_step": 4}}')
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses(output)) == [1, 2, 3, 4] and "continuing at step 2" in done.stdout


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.image_size=96", "model.image_size from 64 to 96"),
        ("checkpoint.resume=false", "checkpoint.resume is false"),
        ("stages.0.freeze=[encoder]", "trained parameters that are frozen now"),
    ],
)
def test_a_run_that_cannot_continue_says_why(
    interrupted: Path, exact_config: Path, synthetic: Path, override: str, message: str
) -> None:
    arguments = command(FORKED, exact_config, synthetic, Path(interrupted.name), "checkpoint.every=1", override)
    done = run(arguments, cwd=interrupted.parent)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_a_digit(path: Path) -> None:
    """To the place in the data."""
    content = path.read_text()
    assert '"taken": ' in content
    path.write_text(content.replace('"taken": ', '"taken": 1', 1))


DAMAGES = {
    "size": (FILE, cut, f"{FILE} has 300 bytes and not"),
    "checksum": (FILE, flip, f"{FILE} has another checksum than when it was written"),
    "missing": (FILE, Path.unlink, f"{FILE} is missing"),
    "state": ("state.json", add_a_digit, "state.json cannot be read: its text is not that which was written"),
    "cut-state": ("state.json", cut, "state.json cannot be read"),
    "no-state": ("state.json", Path.unlink, "state.json is missing"),
}


OFTEN = ("size", "state")
"""Tried in every run of the tests; test_checkpoint_header.py tells all damages apart without training."""


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in OFTEN)) for name in DAMAGES]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    interrupted: Path, exact_config: Path, synthetic: Path, damage: str
) -> None:
    name, change, reason = DAMAGES[damage]
    *_, before, newest = sorted((interrupted / "checkpoints").glob("step_*"))
    change(newest / name)
    ranks = TWO_FORKED if damage == "size" else FORKED
    arguments = command(ranks, exact_config, synthetic, Path(interrupted.name), "checkpoint.every=1")
    done = run(arguments, cwd=interrupted.parent)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (warning,) = [line for line in done.stdout.splitlines() if "damaged" in line]
    assert warning.startswith("warning: ") and newest.name in warning and reason in warning
    assert f"continuing from {Path('run') / 'checkpoints' / before.name}" in warning
    assert f"continuing at step {int(before.name[-8:])} " in done.stdout
    assert list(losses(interrupted)) == [1, 2, 3, 4]


def test_without_a_whole_checkpoint_there_is_one_error(interrupted: Path, exact_config: Path, synthetic: Path) -> None:
    found = sorted((interrupted / "checkpoints").glob("step_*"))
    for path in found:
        cut(path / FILE)
    done = run(command(TWO_FORKED, exact_config, synthetic, Path(interrupted.name)), cwd=interrupted.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert "no checkpoint can be used" in done.stderr and all(path.name in done.stderr for path in found)


def test_a_changed_learning_rate_is_used(interrupted: Path, exact_config: Path, synthetic: Path) -> None:
    """The optimizer's state keeps the rate it was saved with; what the command says now must win."""
    resumed = sorted((interrupted / "checkpoints").glob("step_*"))[-1]
    dcp_to_torch_save(resumed, interrupted / "tensors.pt")
    before = torch.load(interrupted / "tensors.pt", weights_only=True)
    arguments = command(FORKED, exact_config, synthetic, Path(interrupted.name), "stages.0.optim.lr=1e-12")
    done = run(arguments, cwd=interrupted.parent)
    assert done.returncode == 0 and "changed settings" in done.stdout, done.stderr[-2000:]
    assert "stages.0.optim.lr" in done.stdout
    after = from_official(torch.load(interrupted / "export" / "model.pt", weights_only=True)["model"])
    assert max((after[name] - before[f"weights/{name}"]).abs().max().item() for name in after) < 1e-9
