"""Says which rank is late or lost, and where, instead of leaving a run that hangs or a bare error of a collective.

A daemon thread of each rank notes once a second where the rank is (place.py, sightings.py), through a connection of its
own: training neither waits for it nor sends anything more. One rank reads the notes of the others when there is
something to explain: it has not moved for `engine.stall_minutes`, or a collective has failed. The thread also ends slow
work that hangs, for which ranks would wait without end (`Ranks.agree`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist

from ..config import EngineConfig
from .mesh import Ranks
from .place import HERE
from .sightings import DONE, LOST, Board, Sighting, find_cause

BEAT = 1.0
"""Seconds between two notes of a rank."""
SILENT_BEATS = 3
"""A rank without a new note for as long does not answer."""
GRACE = 20.0
"""Seconds that a rank has to end by itself when another has ended with an error."""
STANDSTILL = 2.0
"""Times `engine.timeout_minutes`, after which slow work that does not use a CPU hangs."""


class LostRankError(RuntimeError):
    """A rank is lost or too late; the message names it."""


class Watchdog:
    """Watches over this rank, and knows of the others.

    Args:
        orphaned: called once where the launcher that started this process is gone.
        planned: an exception by which all ranks end as they should.
    """

    def __init__(
        self, ranks: Ranks, config: EngineConfig, orphaned: Callable[[], None], planned: type[Exception]
    ) -> None:
        self._ranks, self._config, self._orphaned, self._planned = ranks, config, orphaned, planned
        self._stall = 60 * min(config.stall_minutes, config.timeout_minutes / 2)
        self._limit = STANDSTILL * config.timeout_minutes
        self._board: Board | None = None
        self._over = threading.Event()
        self._beat = 0
        self._hung = ""
        """The error of slow work of this rank that hangs."""
        self._told = -1
        """The place, by its sequence, whose stall was reported."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch over what is done within.

        Raises:
            LostRankError: in place of the error of a collective that failed because of another rank.
        """
        if self._ranks.world_size > 1:
            self._board = Board(self._ranks)
            self._note()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        ended = DONE
        try:
            yield
        except RuntimeError as error:
            if self._board is None or not is_lost_peer(error):
                ended = _first_line(error)
                raise
            ended = LOST
            raise LostRankError(self._explain(error)) from error
        except Exception as error:
            ended = DONE if isinstance(error, self._planned) else _first_line(error)
            raise
        finally:
            self._over.set()
            thread.join()
            self._note(ended)

    def _watch(self) -> None:
        launcher, failure, failed = _launcher(), "", 0.0
        while not self._over.wait(BEAT):
            self._note()
            if launcher and os.getppid() != launcher:
                launcher = 0
                self._say("the launcher of this run is gone: it saves a checkpoint and ends")
                self._orphaned()
            if time.monotonic() - HERE.since > self._stall and HERE.sequence != self._told:
                self._told = HERE.sequence
                self._report_stall()
            if self._board and not failure:
                self._check_slow_work()
                failure, failed = self._board.failure(), time.monotonic()
            if failure and time.monotonic() - failed > GRACE:
                self._say(f"ends by the error of {failure}")
                os._exit(1)  # the main thread waits in a collective, perhaps on the device, that nobody will answer

    def _check_slow_work(self) -> None:
        """Report slow work that hangs as the error of this rank: all ranks end by it, this one too."""
        seconds, work = HERE.standstill()
        if seconds > 60 * self._limit:
            self._hung = (
                f"{work} hangs: for {seconds / 60:.1f} minutes it has not used a CPU, and the limit is {STANDSTILL:g} "
                f"times engine.timeout_minutes={self._config.timeout_minutes:g}; look at the file system"
            )
            self._note()
            self._say(f"error: {self._hung}. The same command continues from the last checkpoint")

    def _report_stall(self) -> None:
        since, minutes = HERE.since, (time.monotonic() - HERE.since) / 60
        if self._board is None:
            self._say(f"no progress for {minutes:.1f} minutes: {self._myself()}")
            return
        if not self._board.claim(f"look at {HERE.sequence}"):  # of those who wait in the same place, one looks
            return
        found = self._look()
        name, text = find_cause(found)
        behind = min(each.sequence for each in found)
        if HERE.since == since and self._board.claim(f"stall of {name} at {behind}"):
            limit = f"After engine.timeout_minutes={self._config.timeout_minutes:g} the run ends"
            if any(each.at_work for each in found if each.sequence == behind):
                limit = f"After {self._limit:g} minutes in which that work does not use a CPU the run ends"
            self._say(
                f"no progress for {minutes:.1f} minutes: {text}. {limit}; py-spy dump --pid PROCESS says where a "
                "process hangs"
            )

    def _explain(self, error: RuntimeError) -> str:
        """The message in place of an error of a collective."""
        timed_out = "imed out" in str(error)
        if not self._board.claim("explanation"):
            name = self._board.hear("cause") or "another rank"
            return f"ends because of {name}; the first rank that noticed says more"
        name, text = find_cause(self._look(), hang=timed_out)
        self._board.tell("cause", name)
        waited = ""
        if timed_out:
            waited = f" after engine.timeout_minutes={self._config.timeout_minutes:g}"
        return (
            f"error: no answer{waited}, {self._myself().where}: {text}. The same command continues from the last "
            f"checkpoint (the collective said: {_first_line(error).rpartition('] ')[2].partition('. ')[0]})"
        )

    def _look(self) -> list[Sighting]:
        """All ranks that are known of. It takes a few seconds to see which ones do not answer."""
        before = {each.rank: each for each in self._board.read()}
        for _ in range(SILENT_BEATS):
            if self._board.gone or any(each.failed or each.dead for each in before.values()):
                return list(before.values())
            if threading.current_thread() is threading.main_thread():
                time.sleep(BEAT)
            else:  # nobody else writes the notes of this rank meanwhile
                self._over.wait(BEAT)
                self._note()
        return [
            replace(now, silent=now.rank in before and now.beat == before[now.rank].beat and not now.ended)
            for now in self._board.read()
        ]

    def _myself(self, ended: str = "") -> Sighting:
        return Sighting.of(HERE, self._ranks.rank, self._beat, ended)

    def _note(self, ended: str = "") -> None:
        self._beat += 1
        if self._board is not None:
            self._board.note(self._myself(ended or self._hung))

    def _say(self, text: str) -> None:
        prefix = f"[rank {self._ranks.rank}] " if self._ranks.world_size > 1 else ""
        try:
            print(f"{prefix}watchdog: {text}", file=sys.stderr, flush=True)
        except OSError:
            pass  # what it wrote to was the launcher's


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank ended or did not come."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text


def _launcher() -> int:
    """The process that started this one, where it is torchrun or the deepspeed launcher, else 0."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ else 0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:500] or type(error).__name__
