"""Time of providers, measured in turns, and the copy bandwidth to compare them with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .case import Case, Run

BUDGET_S = 15.0
"""Rounds of one shape go on for about this long."""
MIN_ROUNDS, MAX_ROUNDS = 5, 100
EVICTOR_BYTES = 256 << 20
"""Written before each measurement: more than the last-level cache holds."""
HEAD_START = 16
"""Such writes on a GPU: they keep it busy for about a millisecond, in which the host queues what is measured.

Kernels then run back to back, as in a training step whose host is ahead, and no provider is charged for Python."""
COPY_BYTES = 512 << 20


class Clock:
    """Marks moments: CUDA events on a GPU, whose work is asynchronous, and the monotonic clock of a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps_ms(self) -> list[float]:
        """Milliseconds between neighboring marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]


def time_once(case: Case, run: Run, inputs: Any, modes: Sequence[str], device: torch.device) -> dict[str, float]:
    """Milliseconds of each mode from one pass: `fwd` and `bwd` are the two parts of `full`.

    Results are freed after the last mark, but what the backward pass frees on its way counts.
    """
    clock = Clock(device)
    clock.mark()
    outputs = run(inputs)
    clock.mark()
    if set(modes) != {"fwd"}:
        gradient = case.backward(inputs, outputs)  # noqa: F841  (kept until the time is taken)
        clock.mark()
    laps = clock.laps_ms()
    times = {"fwd": laps[0], "bwd": laps[-1], "full": sum(laps)}
    return {mode: times[mode] for mode in modes}


def interleave(
    measure: dict[str, Callable[[], dict[str, float]]], device: torch.device, repeats: int | None
) -> dict[str, list[dict[str, float]]]:
    """Measure all providers once a round, in rotating order and with cold caches, so that drift meets all alike.

    Args:
        measure: by provider, what times one pass.
        repeats: number of rounds; None goes on for `BUDGET_S` seconds, `MIN_ROUNDS` at least, `MAX_ROUNDS` at most.

    Returns:
        By provider, the result of each round; a warm-up round is left out.
    """
    names = list(measure)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    evictor = torch.empty(EVICTOR_BYTES, dtype=torch.uint8, device=device)
    start = 0.0
    for round_number in range(1 + (repeats or MAX_ROUNDS)):
        if round_number == 1:
            start = time.monotonic()
        done = round_number - 1
        if repeats is None and done >= MIN_ROUNDS and time.monotonic() - start > BUDGET_S:
            break
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            for _ in range(HEAD_START if device.type == "cuda" else 1):
                evictor.fill_(round_number % 256)
            result = measure[name]()
            if round_number > 0:
                results[name].append(result)
    return results


def copy_gbps(device: torch.device) -> float:
    """Bandwidth of `Tensor.copy_` between two large buffers, bytes read plus written, with torch's thread count."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    target.copy_(source)  # touches the pages
    clock.mark()
    for _ in range(7):
        target.copy_(source)
        clock.mark()
    return 2 * COPY_BYTES / quantile(clock.laps_ms(), 0.5) / 1e6


def quantile(values: Sequence[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()
