"""Ranks for a thread that works beside training: their collectives are their own and go over the host's network."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .mesh import Ranks


@dataclass(frozen=True)
class BackgroundRanks(Ranks):
    """The same ranks in a process group of their own, so that a collective never meets one of another thread."""

    group: dist.ProcessGroup

    @classmethod
    def beside(cls, ranks: Ranks, timeout_minutes: float) -> BackgroundRanks:
        """Called on every rank, in the same order as other process groups are made.

        Args:
            timeout_minutes: how long a collective may wait for a rank.
        """
        values = {field.name: getattr(ranks, field.name) for field in fields(ranks)}
        return cls(**values, group=dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)))

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values
