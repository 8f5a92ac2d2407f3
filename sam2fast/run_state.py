"""What a run continues from besides weights and optimizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .config import StageConfig, UserError


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
    records: int = 0
    """Videos or images of the dataset; the order of samples depends on their number."""
    names: str = ""
    """Digest of their names: which of them a sample shows depends on these."""
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
