"""Where each rank was last seen: notes in the key-value store of the process group, and which rank they speak against.

Every rank overwrites its own note. Nobody reads those of the others but to explain something.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from .agreement import name_ranks
from .mesh import Ranks, connect
from .place import Place

T = TypeVar("T")

_TIMEOUT = timedelta(seconds=10)
_NAMED = 4
"""Ranks that a message describes at most."""
_ASKED = 0.5
"""Seconds between two requests for what another rank is about to say."""
_MAIN_EVERY = 5
"""Requests for a failure of which one also reads the note of rank 0."""
LOST, DONE = "lost", "done"


@dataclass(frozen=True)
class Sighting:
    """What a rank has noted of itself."""

    rank: int
    beat: int
    host: str
    pid: int
    stage: str
    step: int
    phase: str
    collective: str
    sequence: int
    ended: str = ""
    """Why it has ended: its error, LOST where it ended because of another rank, or DONE."""
    silent: bool = False
    """It goes on writing no notes."""
    work: str = ""
    """Slow work that it has under way."""

    @classmethod
    def of(cls, place: Place, rank: int, beat: int, ended: str = "") -> Sighting:
        """This process now."""
        work = " and ".join(each.what for each in tuple(place.works))
        return cls(rank, beat, socket.gethostname(), os.getpid(), place.stage, place.step, place.phase,
                   place.collective, place.sequence, ended, work=work)  # fmt: skip

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}), {self.where}"

    @property
    def where(self) -> str:
        """For instance: in saving a checkpoint (reading a checkpoint back), after step 5 of stage 'video'."""
        after = f"after step {self.step} of stage {self.stage!r}" if self.stage else "before the first stage"
        work = f" ({self.work})" if self.work else ""
        return f"in {self.collective or self.phase}{work}, {after}"

    @property
    def at_work(self) -> bool:
        """It does slow work, or may wait for another of its threads that does."""
        return bool(self.work) and not self.collective

    @property
    def failed(self) -> bool:
        """It has ended by an error of its own."""
        return self.ended not in ("", LOST, DONE)

    @property
    def dead(self) -> bool:
        """It has ended without a word, as far as that can be seen from this machine."""
        if self.ended or self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return Path("/proc/self/stat").exists()  # false where there is no /proc
        except (OSError, IndexError):
            return False
        return state in "ZX"


class Board:
    """The notes of all ranks. A store that is gone is no error here: `gone` says so."""

    def __init__(self, ranks: Ranks) -> None:
        self.world_size = ranks.world_size
        self.gone = False
        self._store = dist.PrefixStore("watchdog", connect(_TIMEOUT))
        self._requests = 0
        self._main: Sighting | None = None
        """Rank 0 as last seen: where it keeps the store, nothing can be asked when it is gone."""

    def note(self, sighting: Sighting) -> None:
        """Write the note of this rank."""
        self._try(lambda: self._store.set(f"rank/{sighting.rank}", json.dumps(asdict(sighting))))
        if sighting.failed:
            self._try(lambda: self._store.set("failed", f"rank {sighting.rank}: {sighting.ended}"))

    def failure(self) -> str:
        """The rank that ended with an error, and the error; empty where none has. Asked every second: it is one
        request, and now and then those for the note of rank 0."""
        if self._requests % _MAIN_EVERY == 0:
            self._main = self._read([0])[0] or self._main
        self._requests += 1
        return self._get(["failed"])[0] or ""

    def read(self) -> list[Sighting]:
        """The notes there are."""
        found = self._read(range(self.world_size))
        if self.gone and self._main:
            found[0] = replace(self._main, silent=True)
        return [each for each in found if each]

    def claim(self, what: str) -> bool:
        """Whether this rank is the first to ask: it looks at all notes and tells the user, the others need not."""
        return self._try(lambda: self._store.add(f"claim/{what}", 1) == 1) is not False

    def tell(self, what: str, text: str) -> None:
        """Say to those who `hear` it what this rank has found, and let them: with rank 0 the store may go."""
        self._try(lambda: self._store.set(f"told/{what}", text))
        time.sleep(2 * _ASKED)

    def hear(self, what: str) -> str:
        """What the rank that has claimed it found; empty where it does not say so in time. That rank then goes on
        first: a launcher may kill it when this one ends."""
        deadline = time.monotonic() + _TIMEOUT.total_seconds()
        while not self.gone and time.monotonic() < deadline:
            if text := self._get([f"told/{what}"])[0]:
                time.sleep(3 * _ASKED)
                return text
            time.sleep(_ASKED)  # a request that waits would hold up the notes of this rank
        return ""

    def _read(self, ranks: Sequence[int]) -> list[Sighting | None]:
        notes = self._get([f"rank/{rank}" for rank in ranks])
        return [Sighting(**json.loads(note)) if note else None for note in notes]

    def _get(self, keys: Sequence[str]) -> list[str | None]:
        """Values of keys, in two requests where all are there."""
        store = self._store
        if len(keys) > 1 and store.has_extended_api() and self._try(lambda: store.check(keys)):
            found = self._try(lambda: store.multi_get(keys)) or [None] * len(keys)
        else:
            found = [self._try(lambda key=key: store.get(key) if store.check([key]) else None) for key in keys]
        return [value.decode() if value is not None else None for value in found]

    def _try(self, request: Callable[[], T]) -> T | None:
        if self.gone:
            return None
        try:
            return request()
        except (dist.DistError, RuntimeError):
            self.gone = True
            return None


def find_cause(found: Sequence[Sighting], hang: bool = True) -> tuple[str, str]:
    """Which ranks hold up the others, as a short name, and a sentence about them.

    Args:
        found: the ranks that are known of, this one too, with `silent` set where it holds.
        hang: ranks wait for each other; else a connection broke.
    """
    failed = [each for each in found if each.failed]
    if failed:
        return _name(failed), "; ".join(f"{each} ended with its own error: {each.ended}" for each in failed[:_NAMED])
    lost = [each for each in found if each.dead or each.silent]
    if lost:
        return _name(lost), (
            f"{_describe(lost)} when it was last seen, does not answer any more: it was killed, has crashed or is "
            "stopped, or its machine is gone (where memory ran out, the kernel's log says so)"
        )
    running = [each for each in found if not each.ended]
    if len(running) < len(found):
        return "the other ranks", f"{name_ranks([each.rank for each in found if each.ended])} ended before"
    if not hang:
        return "the network", "a connection between ranks broke, and all of them still run: look at the network"
    behind = min(each.sequence for each in running)
    late = [each for each in running if each.sequence == behind]
    waiting = [each for each in running if each.sequence > behind]
    if not waiting:  # perhaps for other threads
        late = [each for each in running if each.at_work]
        waiting = [each for each in running if each not in late]
    if not late or not waiting:
        return "all ranks", f"all ranks are {running[0].where}: it takes long, or the network or a device hangs"
    places = dict.fromkeys(each.where for each in waiting)
    verb = "waits" if len(waiting) == 1 else "wait"
    return _name(late), (
        f"{_describe(late)} is late; {name_ranks([each.rank for each in waiting])} {verb} {' or '.join(places)}"
    )


def _name(found: Sequence[Sighting]) -> str:
    return name_ranks([each.rank for each in found])


def _describe(found: Sequence[Sighting]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(map(str, found[:_NAMED])) + more
