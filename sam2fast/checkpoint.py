"""The state of a run on disk: written whole or not at all, and found again by the same command.

A run folder holds checkpoints/step_XXXXXXXX/ with the engine's files and state.json. A checkpoint is written under a
temporary
name and renamed when every rank has finished, so a folder with a final name is complete.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import UserError
from .parallel import Engine, Ranks


class ResumeError(UserError):
    """A checkpoint that this run cannot continue from."""


@dataclass
class RunState:
    """What continues besides weights and optimizer. The order of samples is a function of (seed, stage), all other
    randomness one of (seed, stage, step)."""

    stage: int = 0
    """Index of the stage that is being trained."""
    step: int = 0
    """Optimizer steps done in that stage."""
    positions: list[int] = field(default_factory=list)
    """Samples taken from each entry of the stage's `data` by all ranks: another number of ranks, or another batch size,
    continues with the sample after them. Empty before the first step."""
    global_step: int = 0
    bad_steps: int = 0
    """Steps skipped so far because a loss or gradient was not finite."""
    bad_streak: int = 0
    seconds: float = 0.0
    """Wall time spent before this state, over all resumes."""
    guards: dict[str, Any] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    """Samples of each dataset of the current stage in one optimizer step, as the stage began. The order of balanced
    samples depends on it, so it stays when the stage goes on with more or fewer."""
    stopped: str = ""
    """Why the current stage ended before its last step; empty while it goes on."""


class CheckpointStore:
    """Saves, finds and prunes the checkpoints of one run."""

    def __init__(self, run_dir: Path, keep: int, ranks: Ranks) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.ranks = ranks

    def save(self, engine: Engine, state: RunState) -> Path:
        """Write a checkpoint of `state.global_step` (called on every rank)."""
        final = self.folder / f"step_{state.global_step:08d}"
        partial = self.folder / f".{final.name}.partial"
        if self.ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.ranks.barrier()
        engine.save(partial)
        self.ranks.barrier()
        if self.ranks.main:
            header = {
                "state": asdict(state),
                "layout": engine.layout,
                "torch": torch.__version__,
            }
            (partial / "state.json").write_text(json.dumps(header, indent=1))
            _publish(partial, final)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.ranks.barrier()
        return final

    def complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if (path / "state.json").is_file())

    def latest(self) -> tuple[Path, RunState] | None:
        """The newest finished checkpoint and its state."""
        found = self.complete()
        if not found:
            return None
        return found[-1], RunState(**_header(found[-1])["state"])

    def load(self, engine: Engine, path: Path) -> None:
        """Restore weights and optimizer.

        Raises:
            ResumeError: the checkpoint fits another engine, precision or set of trained parameters, or is damaged.
        """
        saved, wanted = _header(path)["layout"], engine.layout
        different = [name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)]
        if different:
            changes = ", ".join(
                f"{LAYOUT_NAMES.get(name, name)} {saved.get(name)} (now {wanted.get(name)})"
                for name in sorted(different)
            )
            raise ResumeError(
                f"{path} was written with {changes}; undo the change, or start a new output_dir with "
                "model.checkpoint set to the weights of the last finished stage"
            )
        try:
            engine.load(path)
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            raise _unreadable(path, error) from error


LAYOUT_NAMES = {
    "engine": "engine",
    "zero_stage": "ZeRO stage",
    "world_size": "number of ranks",
    "groups": "trained parameters per group",
}


def write_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under a temporary name and rename it when it is whole."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    _publish(partial, final)


def save_state(folder: Path, state: RunState) -> None:
    """Write `state` beside the weights of a finished stage."""
    (folder / "state.json").write_text(json.dumps({"state": asdict(state)}, indent=1))


def load_state(folder: Path) -> RunState:
    """Read what `save_state` wrote.

    Raises:
        ResumeError: the file is damaged.
    """
    return RunState(**_header(folder)["state"])


def _header(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ResumeError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResumeError(
        f"{path} cannot be read ({reason}); delete this folder to continue from what was saved before it"
    )


def _publish(partial: Path, final: Path) -> None:
    """Rename a folder that is whole, durably; an older one of the same name is whole until the new one has taken its
    place."""
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
