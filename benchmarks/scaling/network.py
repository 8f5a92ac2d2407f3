"""How long a collective takes: a latency and a bandwidth for each kind of network, nothing measured by this module.

Time of a collective over n ranks on a buffer of S bytes (the whole one: what is reduced, or what is gathered):

    time = latency + factor x S / bus bandwidth      factor: 2 (n-1)/n  all-reduce
                                                             (n-1)/n    all-gather, reduce-scatter
                                                             1          broadcast, reduce
    bus bandwidth as nccl-tests defines it (doc/PERFORMANCE.md).

A100 nodes, 8 GPUs on NVSwitch and a HDR200 adapter for each:

- in a node, bus bandwidth 227 GB/s and 77 us of latency: least squares over the measured all-reduce of 8 A100s that
  vTrain publishes (trace/a100/AR_GPU8: 229 GB/s at 1 GiB, 202.5 at 64 MiB, 19.8 at 1 MiB); 2 and 4 GPUs reach less,
  197.3 and 221.9 GB/s (the same);
- small messages take NCCL's low-latency protocol instead, at 25 GB/s and 15 us (assumed, so that 1 MiB keeps its
  measured time);
- between nodes at most 24 GB/s for each adapter, so 192 GB/s for 8 (NVIDIA in nccl issues 812 and 412);
- an all-reduce over M nodes goes up and down a tree: 10 us for each doubling of M, so that a small one over 32 nodes
  takes 65 us (62 to 70 us measured, nccl issue 652);
- all-gather and reduce-scatter go round a ring, n-1 steps one after the other: 0.6 us for a step in a node, 2.7 us
  between nodes, 6.6 us to start (NCCL's tuning.cc, as in torch/_inductor/comm_analysis.py), where that is more than 77
  us.

Several groups that use the network of a node at once, as hybrid sharding does, share its adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

US, GB = 1e-6, 1e9
SHARE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Times (n-1)/n: what a ring sends through every rank, in buffers."""


class Network(Protocol):
    """Where ranks are, and what messages between them cost."""

    def seconds(self, kind: str, size: int, ranks: range) -> float:
        """Of a collective of a kind over `ranks` on a buffer of `size` bytes."""


def sent(kind: str, size: int, n: int) -> float:
    """Bytes that a rank sends for a collective over n ranks on a buffer of `size` bytes."""
    if n == 1:
        return 0.0
    return size * (SHARE[kind] * (n - 1) / n if kind in SHARE else 1.0)


@dataclass(frozen=True)
class Nodes:
    """GPU nodes with adapters of their own, by default those of a DGX A100."""

    gpus: int = 8
    nvlink: float = 227 * GB
    """Bus bandwidth of a whole node in bytes/s."""
    few_gpus: tuple[tuple[int, float], ...] = ((2, 197.3 * GB), (4, 221.9 * GB))
    """Bus bandwidth of fewer GPUs of it."""
    adapter: float = 24 * GB
    """Of one adapter, one for each GPU."""
    latency: float = 77 * US
    low_latency: float = 15 * US
    low_latency_bandwidth: float = 25 * GB
    tree_level: float = 10 * US
    ring_start: float = 6.6 * US
    ring_step: float = 0.6 * US
    ring_node_step: float = 2.7 * US

    def seconds(self, kind: str, size: int, ranks: range) -> float:
        n = len(ranks)
        if n == 1:
            return 0.0
        nodes = len({rank // self.gpus for rank in ranks})
        volume = sent(kind, size, n)
        bandwidth = self._bandwidth(n, nodes)
        tree = self.tree_level * math.log2(nodes)
        if kind in ("all_gather", "reduce_scatter"):
            steps = (n - nodes) * self.ring_step + (nodes - 1) * self.ring_node_step
            return max(self.latency, self.ring_start + steps) + volume / bandwidth
        slow, fast = self.latency + tree, self.low_latency + tree
        return min(slow + volume / bandwidth, fast + volume / min(self.low_latency_bandwidth, bandwidth))

    def _bandwidth(self, n: int, nodes: int) -> float:
        inside = next((rate for most, rate in self.few_gpus if n // nodes <= most), self.nvlink) if nodes == 1 else None
        if inside is not None:
            return inside
        # Other groups with as many ranks in each node use its other adapters at the same time.
        return min(self.nvlink, self.adapter * (n / nodes))


A100 = Nodes()


@dataclass(frozen=True)
class Line:
    """Latency in seconds and bus bandwidth in bytes/s, fitted to measured times."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Measured:
    """A network of which each kind of collective was timed."""

    lines: dict[str, Line]

    def seconds(self, kind: str, size: int, ranks: range) -> float:
        if len(ranks) == 1:
            return 0.0
        line = self.lines[kind]
        return line.latency + sent(kind, size, len(ranks)) / line.bandwidth


def fit(kind: str, n: int, times: dict[int, float]) -> Line:
    """The line through measured seconds by bytes with the least squares of relative errors.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(times) < 2:
        raise ValueError(f"a line needs at least two sizes, not {len(times)}")
    # Weighted least squares of time = a + b x volume, weights 1 / time^2, so that small messages count as large ones.
    points = [(sent(kind, size, n), seconds) for size, seconds in times.items()]
    weight = [1 / seconds**2 for _, seconds in points]
    total = sum(weight)
    mean_x = sum(w * x for w, (x, _) in zip(weight, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weight, points, strict=True)) / total
    above = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weight, points, strict=True))
    slope = above / sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weight, points, strict=True))
    slope = max(slope, 1e-15)  # noise may make larger messages the faster ones
    return Line(max(0.0, mean_y - slope * mean_x), 1 / slope)
