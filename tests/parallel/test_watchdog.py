"""The watchdog: of ranks that wait one looks for all, and slow work that hangs is named and ended."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sam2fast.config import EngineConfig
from sam2fast.parallel import HERE, Ranks, Watchdog, sightings, watchdog
from sam2fast.parallel.place import SlowWork
from sam2fast.parallel.sightings import Board, Sighting

WORLD_SIZE = 3


class Counted:
    """A store that remembers what it was asked."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name != "has_extended_api":
            self.requests.append(name)
        return getattr(self.store, name)


@pytest.fixture(autouse=True)
def _one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(sightings, "connect", lambda timeout: store)
    monkeypatch.setattr(watchdog, "BEAT", 0.01)
    monkeypatch.setattr(sightings, "_ASKED", 0.01)


def ranks_of(rank: int) -> Ranks:
    return Ranks(rank, WORLD_SIZE, rank, torch.device("cpu"))


def dog(rank: int, **settings: float) -> Watchdog:
    """A watchdog that can ask, and does not watch yet."""
    made = Watchdog(ranks_of(rank), EngineConfig(**settings), orphaned=lambda: None, planned=KeyboardInterrupt)
    made._board = Board(ranks_of(rank))
    made._note()
    return made


@contextmanager
def hanging(what: str) -> Iterator[None]:
    """Slow work of another thread that does nothing."""
    begun, over = threading.Event(), threading.Event()

    def hang() -> None:
        with HERE.at_work(what):
            begun.set()
            over.wait(60)

    thread = threading.Thread(target=hang)
    thread.start()
    begun.wait(60)
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_all_notes_are_two_requests() -> None:
    board = Board(ranks_of(0))
    notes = [replace(Sighting.of(HERE, rank, 1), work="counting objects") for rank in range(WORLD_SIZE)]
    for note in notes[:2]:
        board.note(note)
    assert board.read() == notes[:2]  # one is not there yet
    board.note(notes[2])
    board._store = Counted(board._store)
    assert board.read() == notes
    assert board._store.requests == ["check", "multi_get"]


def test_asking_for_a_failure_is_one_request() -> None:
    board = Board(ranks_of(0))
    board.note(Sighting.of(HERE, 0, 1))
    board._store = Counted(board._store)
    assert not board.failure()
    board._store.requests.clear()
    assert not board.failure()
    assert board._store.requests == ["check"]
    board.note(Sighting.of(HERE, 1, 2, "out of memory"))
    assert board.failure() == "rank 1: out of memory"


def test_one_rank_looks_for_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    reads, read = [], Board.read
    monkeypatch.setattr(Board, "read", lambda board: (reads.append(board), read(board))[1])
    dogs = [dog(rank) for rank in range(WORLD_SIZE)]
    dogs[2]._note("out of memory")
    said = [each._explain(RuntimeError("Connection closed by peer")) for each in dogs[:2]]
    assert len(reads) == 1
    assert "rank 2 (process" in said[0] and "ended with its own error: out of memory" in said[0]
    assert said[1] == "ends because of rank 2; the first rank that noticed says more"
    reads.clear()
    for each in dogs[:2]:
        each._report_stall()
    assert len(reads) == 1
    assert capsys.readouterr().err.count("no progress for") == 1


def test_work_stands_still_where_its_thread_does_not_run() -> None:
    assert HERE.standstill() == (0.0, "")
    with hanging("counting objects"):
        deadline = time.monotonic() + 60
        while HERE.standstill()[0] < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert HERE.standstill()[1] == "counting objects"
        with HERE.at_work("work of this thread, which runs"):
            assert HERE.standstill()[1] == "counting objects"
    alive = SlowWork.here("work of this thread")
    first = alive.standstill(), alive.since
    assert alive.standstill() < 60 and alive.since > first[1]


def test_slow_work_that_hangs_ends_all_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.0)
    late, waiting = dog(1, timeout_minutes=0.001), dog(0, timeout_minutes=60.0)
    codes = []
    for each in (late, waiting):
        monkeypatch.setattr(os, "_exit", lambda code, each=each: (codes.append(code), each._over.set()))
        with hanging("counting objects"):  # of one process both
            each._watch()
    printed = capsys.readouterr().err
    assert codes == [1, 1]
    assert "[rank 1] watchdog: error: counting objects hangs: for 0.0 minutes it has not used a CPU" in printed
    assert "[rank 0] watchdog: error" not in printed
    assert "[rank 0] watchdog: ends by the error of rank 1: counting objects hangs" in printed
    (failed,) = [each for each in waiting._board.read() if each.failed]
    assert failed.rank == 1 and failed.work == "counting objects"
