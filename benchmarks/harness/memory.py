"""Memory that a provider needs beyond its inputs: what it saves, its scratch, its outputs and the gradient.

On a GPU the caching allocator counts it. On a CPU nothing inside the process sees everything: torch's allocator (and so
its profiler, or a dispatch mode) misses what C++ and OpenMP code allocates for itself. So there the account of Linux is
read, the peak of the resident set (VmHWM), which is reset between two passes through /proc/self/clear_refs:

* in a process of its own (peak_memory.py), where nothing else has left free blocks behind;
* where malloc takes every block of 64 KiB or more from the system and gives it back at once, so that resident memory
  is live memory (`CHILD_ENVIRONMENT`), and malloc_trim gives back the rest before a measurement;
* after a warm-up, which loads code, starts threads and builds caches.

Linux counts pages in batches for each core, so a peak is right within `ProcessMeter.resolution` (0.26 MB for two
threads). A smaller one is reported as that, which is then an upper bound.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .case import Case, Run

CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_DISABLE_HUGE_PAGES = 41  # PR_SET_THP_DISABLE: otherwise 2 MiB may become resident for one touched byte


class Meter(Protocol):
    resolution: int
    """Bytes by which a peak may be wrong."""

    def current(self) -> int:
        """Bytes in use, after giving back what is free."""

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """Largest number of bytes in use since `reset_peak`."""


class CudaMeter:
    resolution = 0

    def current(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


def give_back() -> None:
    """Return what is free to the system, on Linux with glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class ProcessMeter:
    """Resident memory of this process, on Linux with glibc."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_DISABLE_HUGE_PAGES, 1, 0, 0, 0)
        batch = max(32, 2 * (os.cpu_count() or 1))  # pages that a core may hold back from the counter of a process
        self.resolution = resource.getpagesize() * batch * torch.get_num_threads()

    def current(self) -> int:
        give_back()
        return _status("VmRSS")

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)[1])


def peak_bytes(case: Case, run: Run, inputs: Any, modes: Sequence[str], meter: Meter) -> dict[str, int]:
    """Peak of each mode above the inputs; that of `bwd` includes what the forward pass saved for it."""
    case.observe(run, inputs)
    before = meter.current()
    meter.reset_peak()
    outputs = run(inputs)
    peaks = {"fwd": meter.peak() - before}
    if not case.differentiable:
        peaks["full"] = peaks["fwd"]
    elif set(modes) != {"fwd"}:
        meter.reset_peak()
        gradient = case.backward(inputs, outputs)  # noqa: F841  (alive while the peak is read)
        peaks["bwd"] = meter.peak() - before
        peaks["full"] = max(peaks.values())
    return {mode: max(meter.resolution, peaks[mode]) for mode in modes if mode in peaks}


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return 1024 * int(re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)[1])
