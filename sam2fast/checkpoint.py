"""The state of a run on disk: written whole or not at all, and found again by the same command.

A run folder holds checkpoints/step_XXXXXXXX/ with the engine's files and state.json, which lists their sizes and
checksums. A checkpoint is written under a temporary name and renamed when every rank has finished, so a folder with a
final name was complete once; `latest` finds out whether it still is.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import find_damage, list_files, partial_folder, publish, saving
from .config import StageConfig, UserError
from .parallel import Engine, Ranks


class ResumeError(UserError):
    """A checkpoint that this run cannot continue from."""


@dataclass
class EntryState:
    """Where an entry of a stage's `data:` stands. Its fields hold for the stage, wherever in the list it is later."""

    dataset: str
    frames: int
    stream: int
    """Number of its order of samples; no other entry of the stage has it."""
    group: int
    """Samples of an optimizer step when it began. The order of balanced samples depends on it, so it stays when the
    stage goes on with more or fewer."""
    taken: int = 0
    """Samples taken by all ranks: another number of ranks, or another batch size, continues with the next one."""


@dataclass
class RunState:
    """What continues besides weights and optimizer. The order of samples is a function of the seed, the stage, the
    entry's stream and, where it is balanced, of its group and of the numbers of objects that were counted. All other
    randomness is a function of (seed, stage, step), and of the rank for what does not shape the graph."""

    stage: int = 0
    """Index of the stage that is being trained."""
    step: int = 0
    """Optimizer steps done in that stage."""
    entries: list[EntryState] = field(default_factory=list)
    """Entries that the stage's `data` has, or had before the run was continued without them; see `match_entries`."""
    global_step: int = 0
    bad_steps: int = 0
    """Steps skipped so far because a loss or gradient was not finite."""
    bad_streak: int = 0
    seconds: float = 0.0
    """Wall time spent before this state, over all resumes."""
    guards: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""
    """Why the current stage ended before its last step; empty while it goes on."""
    best: dict[str, Any] = field(default_factory=dict)
    """`tag`, `value` and global `step` of the best score, where `checkpoint.best` names one."""
    validation_due: bool = False
    """The validation of this step is still to come: a signal stopped the run before it."""

    def match_entries(self, stage: StageConfig, world_size: int) -> list[EntryState]:
        """The entry of each item of `stage.data`, by its dataset and number of frames; `entries` gets those that are
        new.

        Raises:
            ResumeError: several entries have the same dataset and number of frames, and not as many as before.
        """
        known: dict[tuple[str, int], list[EntryState]] = {}
        for entry in self.entries:
            known.setdefault((entry.dataset, entry.frames), []).append(entry)
        wanted = Counter((item.dataset, item.frames) for item in stage.data)
        for (dataset, frames), count in wanted.items():
            before = len(known.get((dataset, frames), ()))
            if before and before != count:
                raise ResumeError(
                    f"stage {stage.name!r} had {before} entries of dataset {dataset!r} with {frames} frames in `data` "
                    f"and now has {count}, so which of them go on cannot be told; restore them, or start a new "
                    "output_dir with model.checkpoint set to the weights of the last finished stage"
                )
        found = []
        for index, item in enumerate(stage.data):
            entries = known.get((item.dataset, item.frames))
            if entries:
                found.append(entries.pop(0))
            else:
                group = stage.samples_of_step(index, world_size)
                found.append(EntryState(item.dataset, item.frames, len(self.entries), group))
                self.entries.append(found[-1])
        return found


class CheckpointStore:
    """Saves, finds and prunes the checkpoints of one run."""

    def __init__(self, run_dir: Path, keep: int, ranks: Ranks) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.ranks = ranks

    def save(self, engine: Engine, state: RunState) -> Path:
        """Write a checkpoint of `state.global_step` (called on every rank).

        Raises:
            SaveError: on the first rank that cannot write, SystemExit on the others; nothing stays of the checkpoint.
        """
        final = self.folder / f"step_{state.global_step:08d}"
        partial = partial_folder(final)
        what = f"the checkpoint of step {state.global_step}"

        def prepare() -> None:
            with saving(what, final):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write() -> None:
            with saving(what, final):
                engine.save(partial)

        def finish() -> None:
            with saving(what, final):
                header = {
                    "state": asdict(state),
                    "layout": engine.layout,
                    "torch": torch.__version__,
                    "files": list_files(partial),
                }
                (partial / "state.json").write_text(json.dumps(header, indent=1))
                publish(partial, final)

        try:
            self.ranks.agree(lambda: prepare() if self.ranks.main else None)
            self.ranks.agree(write)
            self.ranks.agree(lambda: finish() if self.ranks.main else None, slow=True)
        except (UserError, SystemExit):
            if self.ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.ranks.main:
            self._prune(final, state.best.get("step"))
        self.ranks.barrier()
        return final

    def _prune(self, newest: Path, best: int | None) -> None:
        """Keep the last ones up to `newest`, and the best. Those after it are damaged, or this run would have gone on
        from them."""
        found = self._all()
        now = found.index(newest) + 1
        before = [path for path in found[:now] if _step(path) != best]
        for old in before[: -self.keep] + found[now:]:
            shutil.rmtree(old, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Checkpoints, whole or not, oldest first."""
        return sorted((path for path in self.folder.glob("step_*") if path.is_dir()), key=_step)

    def latest(self, after: int = 0) -> tuple[Path, RunState] | None:
        """The newest checkpoint that is whole, and its state; a newer one that is not is named in a warning.

        Args:
            after: where the run can go on without a checkpoint: older ones are of no interest. 0 is the start.

        Raises:
            ResumeError: there are checkpoints and none is whole, and the run could only start anew; or the newest is of
                another version.
        """
        damaged: list[str] = []
        found = None
        for path in reversed(self._all()):
            if _step(path) <= after:
                break
            damage = _damage(path)
            if not damage:
                found = path, load_state(path)
                break
            damaged.append(f"{path} is damaged ({damage})")
        if damaged and found is None and not after:
            raise ResumeError(
                f"no checkpoint can be used: {'; '.join(damaged)}; restore one of them from a copy, or delete "
                f"{self.folder} to start anew"
            )
        if damaged:
            goes_on = f"from {found[0]}" if found else f"after the last finished stage, at step {after}"
            print(f"warning: {'; '.join(damaged)}; continuing {goes_on}", flush=True)
        return found

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


def save_state(folder: Path, state: RunState) -> None:
    """Write `state` beside the weights of a finished stage."""
    (folder / "state.json").write_text(json.dumps({"state": asdict(state)}, indent=1))


def load_state(folder: Path) -> RunState:
    """Read what `save_state` wrote.

    Raises:
        ResumeError: the file is damaged, or of another version.
    """
    values = _header(folder).get("state")
    try:
        return RunState(**values | {"entries": [EntryState(**entry) for entry in values["entries"]]})
    except (TypeError, KeyError, AttributeError):
        raise ResumeError(
            f"{folder / 'state.json'} was written by another version of sam2fast, which noted the position in the data "
            "otherwise; finish the run with that version, or start a new output_dir with model.checkpoint set to the "
            "weights of the last finished stage"
        ) from None


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / "state.json").read_text())
        if not isinstance(header, dict):
            raise ValueError("it holds no settings")
        return header
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ResumeError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResumeError(
        f"{path} cannot be read ({reason}); delete this folder to continue from what was saved before it"
    )


def _step(path: Path) -> int:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else 0


def _damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint; empty where nothing is, or where they were not listed yet."""
    try:
        return find_damage(path, _header(path).get("files", {}))
    except ResumeError as error:
        cause = error.__cause__
        missing = isinstance(cause, FileNotFoundError)
        return "state.json is missing" if missing else f"state.json cannot be read: {cause}"
    except (TypeError, KeyError, AttributeError):
        return "state.json does not list its files as it should"
