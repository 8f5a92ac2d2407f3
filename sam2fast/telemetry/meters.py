"""Means of training terms, accumulated on the device and read once per log interval, and the times of one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Meters:
    """Mean of every term over the updates that brought it; values that are not finite are left out.

    Terms may differ from update to update. `update` never waits for the device.
    """

    def __init__(self) -> None:
        # By the names that one update brought together: their sums and numbers of finite values, float64 [2, K].
        self._totals: dict[tuple[str, ...], Tensor] = {}

    def update(self, terms: Mapping[str, Tensor]) -> None:
        """Add scalar tensors, all on one device."""
        if not terms:
            return
        values = torch.stack([value.detach() for value in terms.values()]).double()
        finite = values.isfinite()
        totals = torch.stack([values.where(finite, 0.0), finite.double()])
        names = tuple(terms)
        self._totals[names] = self._totals[names] + totals if names in self._totals else totals

    def compute(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means since the last reset; NaN for a term that was never finite. Waits for the device once.

        Args:
            reduce: sums a tensor over ranks, for means over all of them. Every rank must have seen the same terms.
        """
        if not self._totals:
            return {}
        totals = torch.cat(list(self._totals.values()), dim=1)
        sums, counts = (totals if reduce is None else reduce(totals)).tolist()
        by_name: dict[str, tuple[float, float]] = {}
        for name, total, count in zip((name for names in self._totals for name in names), sums, counts, strict=True):
            before = by_name.get(name, (0.0, 0.0))
            by_name[name] = (before[0] + total, before[1] + count)
        return {name: total / count if count else math.nan for name, (total, count) in by_name.items()}

    def reset(self) -> None:
        self._totals.clear()


class IntervalClock:
    """Times and samples since the last log line."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._began, self._data, self._samples, self._steps = time.monotonic(), 0.0, 0, 0

    @contextmanager
    def loading(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._data += time.monotonic() - began

    def count(self, samples: int) -> None:
        """A step of `samples` over all ranks is done."""
        self._samples += samples
        self._steps += 1

    def values(self) -> dict[str, float]:
        """Means by TensorBoard tag; starts a new interval."""
        elapsed, steps = time.monotonic() - self._began, max(1, self._steps)
        values = {
            "perf/samples_per_s": self._samples / elapsed,
            "perf/data_time": self._data / steps,
            "perf/step_time": elapsed / steps,
        }
        self.restart()
        return values
