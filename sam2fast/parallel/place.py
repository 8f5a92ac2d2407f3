"""Where this process is: the stage, step and phase of training, the collective that it waits in, and slow work.

The main thread writes it, and other threads their slow work; the watchdog of this process (watchdog.py) reads it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class SlowWork:
    """Work of one thread that may take longer than others may wait in a collective."""

    what: str
    clock: int
    """Of the CPU time of its thread."""
    used: float = 0.0
    since: float = field(default_factory=time.monotonic)
    """When its thread was last found to have used a CPU."""

    @classmethod
    def here(cls, what: str) -> SlowWork:
        """Of this thread."""
        if hasattr(time, "pthread_getcpuclockid"):
            return cls(what, time.pthread_getcpuclockid(threading.get_ident()))
        return cls(what, time.CLOCK_PROCESS_CPUTIME_ID)  # which never stands still

    def standstill(self) -> float:
        """Seconds for which its thread has not used a CPU, as seen by who asks often."""
        try:
            used = time.clock_gettime(self.clock)
        except OSError:  # its thread has just ended
            return 0.0
        if used > self.used:
            self.used, self.since = used, time.monotonic()
        return time.monotonic() - self.since


@dataclass
class Place:
    """A position in a run. `sequence` counts its changes; ranks do the same one after the other, so whoever has the
    lowest is behind."""

    stage: str = ""
    step: int = 0
    """Steps of the whole run that are done."""
    phase: str = "starting"
    collective: str = ""
    sequence: int = 0
    since: float = field(default_factory=time.monotonic)
    """When it last changed."""
    works: list[SlowWork] = field(default_factory=list)
    """Slow work under way, of any thread."""

    def go(self, phase: str, stage: str | None = None, step: int | None = None) -> None:
        """Note the next phase; stage and step stay unless they are given."""
        self.phase = phase
        self.stage = self.stage if stage is None else stage
        self.step = self.step if step is None else step
        self._advance()

    def touch(self) -> None:
        """Note progress within a phase, as much as this rank has of it alone."""
        self.since = time.monotonic()

    @contextmanager
    def waiting(self, collective: str) -> Iterator[None]:
        """Around a collective of all ranks; an error leaves it noted. Those of other threads move nothing here."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.collective = collective
        self._advance()
        yield
        self.collective = ""
        self._advance()

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """Around slow work of this thread."""
        work = SlowWork.here(what)
        self.works.append(work)
        try:
            yield
        finally:
            self.works.remove(work)

    def standstill(self) -> tuple[float, str]:
        """The longest standstill of slow work, and which work; 0 without any."""
        return max(((work.standstill(), work.what) for work in tuple(self.works)), default=(0.0, ""))

    def _advance(self) -> None:
        self.sequence += 1
        self.since = time.monotonic()


HERE = Place()
"""The place of this process."""
