"""What each loader process works on, in memory that outlives the process: a process that is killed cannot say it."""

from __future__ import annotations

import multiprocessing
import os
import time

import torch

_NAME_BYTES = 240
_IDLE = -1
_ENDING = 10.0
"""Seconds that a process may take to be gone after its connections are."""


class InFlight:
    """Notes of `workers` processes: the process, the sample it loads and the record that this is cut from."""

    def __init__(self, workers: int):
        self._numbers = torch.full((workers, 2), _IDLE).share_memory_()  # process id, sample number
        self._names = torch.zeros((workers, _NAME_BYTES), dtype=torch.uint8).share_memory_()

    def note(self, worker: int, number: int, name: str) -> None:
        """Worker number `worker`, this process, loads sample `number` from the record `name`."""
        text = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
        self._names[worker] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._numbers[worker] = torch.tensor([os.getpid(), number])

    def clear(self, worker: int) -> None:
        """Worker number `worker`, this process, waits for work."""
        self._numbers[worker] = torch.tensor([os.getpid(), _IDLE])

    def some_dead(self) -> bool:
        """Whether a process that noted something has ended; waits for one that is ending. For their parent."""
        deadline = time.monotonic() + _ENDING
        while not (dead := self._dead()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return bool(dead)

    def _dead(self) -> set[int]:
        alive = {child.pid for child in multiprocessing.active_children()}
        return {pid for pid in self._numbers[:, 0].tolist() if pid != _IDLE and pid not in alive}

    def of_dead(self) -> list[tuple[int, str]]:
        """Sample number and record name of what processes were loading that have ended since. For their parent."""
        dead = self._dead()
        return [
            (number, bytes(name).rstrip(b"\0").decode(errors="replace"))
            for (pid, number), name in zip(self._numbers.tolist(), self._names.tolist(), strict=True)
            if number != _IDLE and pid in dead
        ]
