"""The state of a run on disk: written whole or not at all, and found again by the same command.

A run folder holds checkpoints/step_XXXXXXXX/ with the tensors, in files of every rank, and state.json, which holds the
rest and lists the files' sizes and checksums. A checkpoint is written under a temporary name and renamed when every
rank has finished, so a folder with a final name was complete once; `latest` finds out whether it still is.
"""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .checkpoint_files import find_damage, list_files, partial_folder, publish, saving
from .checkpoint_tensors import Staging, files_of, read_alone, read_tensors, stored_shapes, write_tensors
from .config import Config, StageConfig, UserError
from .parallel import BackgroundRanks, Engine, EngineState, Ranks
from .parallel.state import trained_parameters


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
    """Videos or images of the dataset when it began: the order of samples depends on it."""
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
    """Saves, finds and prunes the checkpoints of one run. Made on every rank.

    An asynchronous `save` copies the state and returns; a thread writes it while training goes on. What goes wrong
    there is raised by the next call of `save` or `wait`.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.folder = Path(config.output_dir) / "checkpoints"
        self.config, self.ranks = config, ranks
        self.keep, self.asynchronous = config.checkpoint.keep, config.checkpoint.asynchronous
        self._writers = BackgroundRanks.beside(ranks)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, engine: Engine, state: RunState) -> Path:
        """Save a checkpoint of `state.global_step` (called on every rank); returns where it is or will be.

        Raises:
            SaveError: this one or the one before could not be written, on the first rank that could not; SystemExit on
                the others. Nothing stays of it.
        """
        self.wait()
        final = self.folder / f"step_{state.global_step:08d}"
        self.ranks.agree(lambda: self._prepare(final) if self.ranks.main else None)
        held = engine.state()
        header = {
            "format": FORMAT,
            "state": asdict(state),
            "scaler": held.scaler,
            "trained": list(trained_parameters(engine.module)),
            "layout": engine.layout,
            "config": self.config.model_dump(mode="json"),
            "versions": {"sam2fast": __version__, "torch": torch.__version__, "deepspeed": _version("deepspeed")},
        }
        if self.asynchronous:
            copies = self._staging.copy(held.tensors())
            self._thread = threading.Thread(target=self._write_beside, args=(copies, header, final))
            self._thread.start()
        else:
            self._write(held.tensors(), header, final)
        return final

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written beside this thread."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when nothing is being written any more (called on every rank).

        Raises:
            SaveError: as `save`.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Let a write come to its end, whatever else has happened. Ranks need not call it together."""
        self._join()
        if isinstance(self._error, UserError):
            print(f"warning: {self._error}", flush=True)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_beside(self, tensors: dict[str, Tensor], header: dict[str, Any], final: Path) -> None:
        try:
            self._write(tensors, header, final)
        except BaseException as error:
            self._error = error

    def _prepare(self, final: Path) -> None:
        with saving(_name(final), final):
            for left in self.folder.glob(partial_folder(self.folder / "step_*").name):  # by runs that were killed
                shutil.rmtree(left, ignore_errors=True)
            partial_folder(final).mkdir(parents=True)

    def _write(self, tensors: dict[str, Tensor], header: dict[str, Any], final: Path) -> None:
        ranks, partial = self._writers, partial_folder(final)

        def write() -> None:
            with saving(_name(final), final):
                write_tensors(tensors, partial, ranks.group)

        def check() -> dict[str, dict[str, int]]:
            with saving(_name(final), final):
                return list_files(partial, files_of(ranks.rank, partial))

        def finish() -> None:
            with saving(_name(final), final):
                (partial / "state.json").write_text(json.dumps(header | {"files": files}, indent=1))
                publish(partial, final)

        try:
            ranks.agree(write)
            lists = ranks.gather(ranks.agree(check, slow=True))
            files = {name: entry for each in lists for name, entry in each.items()}
            ranks.agree(lambda: finish() if ranks.main else None, slow=True)
        except (UserError, SystemExit):
            if ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if ranks.main:
            self._prune(final, header["state"]["best"].get("step"))
        ranks.barrier()

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
        """Restore weights and optimizer from what any engine wrote on any number of ranks (called on every rank).

        Raises:
            ResumeError: it is of another model or other trained parameters, of another version, or damaged; on the
                first rank, SystemExit on the others.
        """
        self.ranks.agree(lambda: self._load(engine, path))

    def _load(self, engine: Engine, path: Path) -> None:
        header = _header(path)
        if header.get("format") != FORMAT:
            raise _other_version(path)
        try:
            _compare(path, header["trained"], stored_shapes(path), engine)
            tensors = read_tensors(engine.state().tensors(), path, self._writers.group)
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            if isinstance(error, UserError):
                raise
            raise _unreadable(path, error) from error
        engine.load_state(EngineState.from_tensors(tensors, header["scaler"]))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint of a run, under the names of the model.

    Raises:
        ResumeError: it is damaged, or of another version.
    """
    if damage := _damage(path):
        raise ResumeError(f"{path} is damaged ({damage}); take another checkpoint of the run")
    if _header(path).get("format") != FORMAT:
        raise _other_version(path)
    keys = [key for key in stored_shapes(path) if key.startswith("weights/")]
    return {key.removeprefix("weights/"): value for key, value in read_alone(keys, path).items()}


FORMAT = 2
"""Of the folders of checkpoints; 1 held files of each engine's own."""


def _compare(path: Path, trained: list[str], shapes: Mapping[str, tuple[int, ...]], engine: Engine) -> None:
    """Insist that a checkpoint holds what the engine has."""
    weights = {key.removeprefix("weights/"): shape for key, shape in shapes.items() if key.startswith("weights/")}
    own = {name: value.shape for name, value in engine.module.state_dict().items()}
    own |= {name: getattr(param, "ds_shape", param.shape) for name, param in engine.module.named_parameters()}
    now = trained_parameters(engine.module)
    differences = {
        "parameters that the model does not have": weights.keys() - own.keys(),
        "no values for parameters of the model": own.keys() - weights.keys(),
        "other shapes": {name for name in weights.keys() & own.keys() if tuple(weights[name]) != tuple(own[name])},
        "trained parameters that are frozen now": set(trained) - now.keys(),
        "frozen parameters that are trained now": now.keys() - set(trained),
    }
    found = [f"{what} ({len(names)}: {min(names)}, ...)" for what, names in differences.items() if names]
    if found:
        raise ResumeError(
            f"{path} has {'; '.join(found)}; undo the change, or start a new output_dir with model.checkpoint set to "
            "the weights of the last finished stage"
        )


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
        raise _other_version(folder) from None


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / "state.json").read_text())
        if not isinstance(header, dict):
            raise ValueError("it holds no settings")
        return header
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _other_version(path: Path) -> ResumeError:
    return ResumeError(
        f"{path} was written by another version of sam2fast, which saved other files or noted the position in the data "
        "otherwise; finish the run with that version, or start a new output_dir with model.checkpoint set to the "
        "weights of the last finished stage"
    )


def _unreadable(path: Path, error: Exception) -> ResumeError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResumeError(
        f"{path} cannot be read ({reason}); delete this folder to continue from what was saved before it"
    )


def _name(final: Path) -> str:
    return f"the checkpoint of step {_step(final)}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
