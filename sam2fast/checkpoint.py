"""The state of a run on disk: written whole or not at all, and found again by the same command.

A run folder holds checkpoints/step_XXXXXXXX/ with the tensors, in files of every rank, and state.json, which holds the
rest and lists the files' sizes and checksums. A checkpoint is written under a temporary name and renamed when every
rank has finished, so a folder with a final name was complete once; `latest` finds out whether it still is.
"""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint_files import SaveError, list_files, partial_folder, publish, put_back, saving
from .checkpoint_header import FORMAT, find_fault, load_state, other_version, read_header, unreadable, write_header
from .checkpoint_tensors import Staging, files_of, read_alone, read_tensors, stored_shapes, write_tensors
from .config import Config, UserError
from .parallel import HERE, Engine, EngineState, Ranks
from .parallel.engine import is_out_of_memory
from .parallel.state import trained_parameters
from .parallel.watchdog import is_lost_peer
from .run_state import ResumeError, RunState
from .versions import versions


class CheckpointStore:
    """Saves, finds and prunes the checkpoints of one run. Made on every rank.

    An asynchronous `save` copies the state and returns; a thread writes it while training goes on. What goes wrong
    there is raised by the next call of `save` or `wait`.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.folder = Path(config.output_dir) / "checkpoints"
        self.config, self.ranks = config, ranks
        self.keep, self.asynchronous = config.checkpoint.keep, config.checkpoint.asynchronous
        self._writers = ranks.beside(config.engine.timeout_minutes)
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
            "unreached": held.unreached,
            "trained": list(trained_parameters(engine.module)),
            "layout": engine.layout,
            "config": self.config.model_dump(mode="json"),
            "versions": versions(),
        }
        if self.asynchronous:
            copies = self._staging.copy(held.tensors())
            # Freeing a tensor lets go of the interpreter's lock: beside a busy thread, thousands of them take a second.
            del held
            self._thread = threading.Thread(target=self._write_beside, args=(copies, header, final))
            self._thread.start()
        else:
            self._write(held.tensors(), header, final)
        return final

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written beside this thread."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a write beside this thread has failed; `wait` raises its error."""
        return self._error is not None

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
            with _all_failures(final), HERE.at_work("writing a checkpoint"):
                write_tensors(tensors, partial, ranks.group)

        def check() -> dict[str, dict[str, int]]:
            with _all_failures(final):
                return list_files(partial, files_of(ranks.rank, partial))

        def finish() -> None:
            with _all_failures(final):
                write_header(partial, header | {"files": files})
                publish(partial, final)

        try:
            ranks.agree(write)
            lists = ranks.gather(ranks.agree(check, slow="reading a checkpoint back"))
            files = {name: entry for each in lists for name, entry in each.items()}
            ranks.agree(lambda: finish() if ranks.main else None, slow="publishing a checkpoint")
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
        if newest not in found:  # a file system that is slow to show it
            return
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
        put_back(self.folder)
        damaged: list[str] = []
        found = None
        for path in reversed(self._all()):
            if _step(path) <= after:
                break
            damage = find_fault(path)
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
        header = self.ranks.agree(lambda: _checked_header(engine, path))
        # From here on ranks work together, and an error is one of all of them.
        self.ranks.agree(lambda: self._load(engine, path, header))

    def _load(self, engine: Engine, path: Path, header: dict[str, Any]) -> None:
        like = engine.state().tensors() if engine.state_is_sharded else {}  # which gathers what other ranks hold
        with _readable(path):
            tensors = read_tensors(like, path, self._writers.group)
        state = EngineState.from_tensors(tensors, header["scaler"])
        state.unreached = header.get("unreached", [])
        engine.load_state(state)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever reading files raises is that the checkpoint cannot be read, but for too little memory and lost ranks."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError, pickle.UnpicklingError) as error:
        if is_out_of_memory(error) or (isinstance(error, RuntimeError) and is_lost_peer(error)):
            raise
        raise unreadable(path, error) from error


def _checked_header(engine: Engine, path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that fits the engine."""
    header = read_header(path)
    if header.get("format") != FORMAT:
        raise other_version(path)
    with _readable(path):
        _compare(path, header["trained"], stored_shapes(path), engine)
    return header


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint of a run holds of its model."""

    weights: dict[str, Tensor]
    """Under the names of the model."""
    averaged: bool
    """Whether they are moving averages (`optim.ema`), where those of them that were trained have one."""
    config: dict[str, Any]
    """Of the run, as JSON has it."""


def read_snapshot(path: Path, raw: bool) -> Snapshot:
    """Weights of a checkpoint of a run: their averages if it holds some, unless `raw`.

    Raises:
        ResumeError: it is no checkpoint, damaged, or of another version.
    """
    if damage := find_fault(path):
        raise ResumeError(
            f"{path} is no whole checkpoint ({damage}); take another folder RUN/checkpoints/step_XXXXXXXX"
        )
    header = read_header(path)
    if header.get("format") != FORMAT:
        raise other_version(path)
    with _readable(path):
        stored = stored_shapes(path)
        averaged = not raw and any(key.startswith("averages/") for key in stored)
        kinds = ("weights", "averages") if averaged else ("weights",)  # averages replace weights
        keys = [key for kind in kinds for key in stored if key.startswith(f"{kind}/")]
        weights = {key.partition("/")[2]: value for key, value in read_alone(keys, path).items()}
    return Snapshot(weights, averaged, header["config"])


@contextmanager
def _all_failures(final: Path) -> Iterator[None]:
    """Any error of writing is one of saving: the threads of the other ranks wait to be told of it."""
    try:
        with saving(_name(final), final):
            yield
    except UserError:
        raise
    except Exception as error:
        raise SaveError(f"cannot save {_name(final)} to {final}: {type(error).__name__}: {error}") from error


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


def _name(final: Path) -> str:
    return f"the checkpoint of step {_step(final)}"


def _step(path: Path) -> int:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else 0
