"""How long a step takes in which ranks compute, communicate and wait for each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .collectives import Collective
from .network import Network


@dataclass(frozen=True)
class Stragglers:
    """How much the compute of a step varies from rank to rank, independently.

    objects: (probability, time as a share of the mean) of what a rank may be given; their mean is 1.
    jitter: standard deviation of the rest, as a share, normal.
    """

    objects: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    jitter: float = 0.015
    """Assumed: 1.5 %, as in the roofline of the project; `measure.py` gives that of a cluster."""

    def slowest(self, ranks: int) -> float:
        """Expected time of the slowest of so many ranks, as a share of the mean: the integral of 1 - F(t)^ranks."""
        if self.jitter == 0:
            return self._slowest_of_objects(ranks)
        high = max(share for _, share in self.objects) * (1 + 8 * self.jitter)
        steps = 4000
        width = high / steps
        return sum(1 - self._below((i + 0.5) * width) ** ranks for i in range(steps)) * width

    def _below(self, time: float) -> float:
        """Probability that a rank takes less."""
        return sum(
            probability * 0.5 * math.erfc(-(time / share - 1) / (self.jitter * math.sqrt(2)))
            for probability, share in self.objects
        )

    def _slowest_of_objects(self, ranks: int) -> float:
        expected, below = 0.0, 0.0
        for probability, share in sorted(self.objects, key=lambda pair: pair[1]):
            reached = min(1.0, below + probability)
            expected += share * (reached**ranks - below**ranks)
            below = reached
        return expected


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    """Of the mean rank."""
    waiting: float
    """For the slowest rank."""
    communication: float
    """That nothing hides."""
    hidden: float
    """Communication beside compute."""

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.communication


def step_time(collectives: Sequence[Collective], network: Network, compute: float, stragglers: Stragglers) -> StepTime:
    """Predict a step.

    One collective runs at a time, in the order of the program. One that the program waits for stops compute. An
    overlapped one may run beside compute: what reduces must have ended when the backward pass has, which is when its
    last collective starts; what gathers is asked for one ahead, when the gathering before it has ended, and stops
    compute where the program asks for it. All ranks begin together and the slowest one sets the pace of every
    collective, so waiting comes on top of compute.

    Args:
        compute: seconds of the mean rank for what `Collective.place` is a share of.
    """
    ranks = max((one.ranks * one.stride for one in collectives), default=1)
    scale = stragglers.slowest(ranks) if ranks > 1 else 1.0
    work = compute * scale
    delay = 0.0  # of compute, so far
    free = 0.0  # when the network is
    gathered = 0.0  # when the last gathering had ended
    busy = 0.0
    pending = 0.0  # when the last overlapped reduction ends
    last = max((i for i, one in enumerate(collectives) if one.phase == "backward"), default=-1)
    for i, one in enumerate(collectives):
        now = one.place * work + delay
        took = network.seconds(one.kind, one.size, one.group())
        busy += took
        if one.overlapped and one.kind == "all_gather":
            free = max(free, min(gathered, now)) + took
            gathered = max(now, free)
            delay += gathered - now
        elif one.overlapped and one.phase == "backward":
            free = pending = max(free, now) + took
        else:
            free = max(free, now) + took
            delay += free - now
        if i == last:  # the gradients that come last: the backward pass is over
            delay += max(0.0, pending - one.place * work - delay)
    return StepTime(compute, work - compute, delay, busy - delay if busy - delay > 1e-9 else 0.0)
