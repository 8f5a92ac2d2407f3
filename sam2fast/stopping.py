"""Stopping on request: SIGTERM or SIGUSR1 ends a run after a step, with a checkpoint.

A signal may reach one rank alone, or several at different times, and all must stop after the same step. So every rank
contributes the signal that it has, if any, to a maximum over ranks: begun before a step and read after it. It goes
through a process group on the host and has the whole step to arrive; the device is not asked anything. The price is
that a signal which comes during a step is acted on after the next one, where there are several ranks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .parallel import Ranks
from .signals import STOP_SIGNALS

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: not done, try again."""


class Stopped(Exception):
    """A signal has ended the run between two steps; the message says where it goes on."""


class StopRequest:
    """What signals ask for, agreed on by all ranks.

    Args:
        timeout_minutes: how long a rank may wait for another.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float) -> None:
        self._received = 0
        self._agreed: torch.Tensor | None = None
        self._group = self._work = None
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in place of being ended by them. Signals reach the main thread only; elsewhere does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def begin(self) -> None:
        """Send what this rank has received to the others; every rank does so before a step."""
        if self._group is not None:
            self._agreed = torch.tensor(self._received)
            self._work = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, self._group, async_op=True)

    def end(self) -> str:
        """Name of the signal that some rank had received at `begin`, the same on all ranks; empty where none had."""
        if self._group is None:
            number = self._received
        else:
            self._work.wait()
            number = int(self._agreed)
        return signal.Signals(number).name if number else ""

    def now(self) -> str:
        """The same of this moment. It waits for the other ranks."""
        self.begin()
        return self.end()

    def _note(self, number: int, _: object) -> None:
        self._received = number
