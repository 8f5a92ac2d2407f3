"""Stopping on request: SIGTERM or SIGUSR1 ends a run after a step, with a checkpoint.

A signal may reach one rank alone, or several at different times, and all must stop after the same step. So every rank
contributes the signal that it has, if any, to a maximum over ranks: begun before a step and read after it, so that it
has the whole step to arrive. The price is that a signal which comes during a step is acted on after the next one, where
there are several ranks. With it goes what the next step will be: ranks that differ there end, see `StepAgreement`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .parallel import Ranks, StepAgreement
from .signals import STOP_SIGNALS

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: not done, try again."""


_SAVE_FAILED = signal.NSIG
"""Sent in place of a signal, and above all of them."""


class Stopped(Exception):
    """A signal has ended the run between two steps; the message says where it goes on."""


class StopRequest:
    """What signals ask for, agreed on by all ranks (see `StepAgreement`).

    Args:
        timeout_minutes: how long a rank may wait for another.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float) -> None:
        self._received = 0
        self.save_failed = False
        """Whether a checkpoint could not be written beside training, on any rank."""
        self._agreement = StepAgreement(ranks, timeout_minutes)

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

    def begin(self, following: Mapping[str, Any], save_failed: bool = False) -> None:
        """Send what this rank has received to the others; every rank does so before a step.

        Args:
            following: what shapes the graph of the step after it, on which all ranks must agree.
            save_failed: whether a checkpoint could not be written beside training, on this rank.
        """
        self._agreement.begin(_SAVE_FAILED if save_failed else self._received, following)

    def end(self) -> str:
        """Name of the signal that some rank had received at `begin`, the same on all ranks; empty where none had.

        Raises:
            DivergenceError: on one rank, SystemExit on the others, where ranks would go on differently.
        """
        number = self._agreement.end()
        if number == _SAVE_FAILED:
            self.save_failed = True
            return ""
        return signal.Signals(number).name if number else ""

    def now(self, following: Mapping[str, Any]) -> str:
        """The same of this moment. It waits for the other ranks."""
        self.begin(following)
        return self.end()

    def orphaned(self) -> None:
        """Ask for the stop that a launcher which died cannot ask for any more."""
        self._received = signal.SIGTERM

    def _note(self, number: int, _: object) -> None:
        self._received = number
