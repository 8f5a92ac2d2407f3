"""Where this process is: the stage, step and phase of training, and the collective that it waits in.

The main thread writes it, the watchdog of this process (watchdog.py) reads it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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
        """Around a collective of all ranks; an error leaves it noted. Other threads, whose collectives say that the
        main one is at work (`Ranks.agree`), only note that."""
        if threading.current_thread() is not threading.main_thread():
            self.touch()
            yield
            return
        self.collective = collective
        self._advance()
        yield
        self.collective = ""
        self._advance()

    def _advance(self) -> None:
        self.sequence += 1
        self.since = time.monotonic()


HERE = Place()
"""The place of this process."""
