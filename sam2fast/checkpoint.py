"""The state of a run on disk: written whole or not at all, and found again by the same command.

A run folder holds checkpoints/step_XXXXXXXX/ with the engine's files and state.json. A checkpoint is written under a
temporary
name and renamed when every rank has finished, so a folder with a final name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
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
    """What continues besides weights and optimizer. Data order and randomness are functions of (seed, stage, step)."""

    stage: int = 0
    """Index of the stage that is being trained."""
    step: int = 0
    """Optimizer steps done in that stage."""
    global_step: int = 0
    bad_steps: int = 0
    """Steps skipped so far because a loss or gradient was not finite."""
    bad_streak: int = 0
    seconds: float = 0.0
    """Wall time spent before this state, over all resumes."""
    guards: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""
    """Why training of this run stopped early; empty while it goes on."""


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
                "world_size": self.ranks.world_size,
                "engine": type(engine).__name__,
                "torch": torch.__version__,
            }
            (partial / "state.json").write_text(json.dumps(header, indent=1))
            _flush(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
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
        header = self._header(found[-1])
        return found[-1], RunState(**header["state"])

    def load(self, engine: Engine, path: Path) -> None:
        """Restore weights and optimizer.

        Raises:
            ResumeError: the checkpoint was written by another engine, or sharded over another number of ranks.
        """
        header = self._header(path)
        if header["engine"] != type(engine).__name__:
            raise ResumeError(
                f"{path} was written by {header['engine']} and this run uses {type(engine).__name__}; use the "
                "same launcher or engine.kind, or start a new output_dir"
            )
        if header["engine"] == "DeepSpeedEngine" and header["world_size"] != self.ranks.world_size:
            raise ResumeError(
                f"{path} is sharded over {header['world_size']} ranks and this run has {self.ranks.world_size}; use "
                "the same number, or start a new output_dir from the exported weights with model.checkpoint"
            )
        engine.load(path)

    @staticmethod
    def _header(path: Path) -> dict[str, Any]:
        try:
            return json.loads((path / "state.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ResumeError(
                f"{path} cannot be read ({error}); delete this folder to continue from the checkpoint before it"
            ) from None


def _flush(folder: Path) -> None:
    """Make the files durable before the rename that declares them complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
