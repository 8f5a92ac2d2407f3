"""What must be equal on all ranks, compared before any of them enters a collective in which it would wait in vain."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..config import UserError
from .place import HERE

if TYPE_CHECKING:
    from .mesh import Ranks

_SHOWN = 8
"""Differences that an error lists at most."""


class DivergenceError(UserError):
    """Ranks are about to do different things."""


def differences(values: Sequence[Mapping[str, Any]]) -> str:
    """The entries that differ between ranks, each with the ranks that have it: `seed is 0 on rank 0 and 1 on rank 1`.

    Args:
        values: of each rank, in rank order.
    """
    keys = list(dict.fromkeys(key for each in values for key in each))
    lines = []
    for key in keys:
        ranks_of: dict[str, list[int]] = {}
        for rank, each in enumerate(values):
            ranks_of.setdefault(repr(each[key]) if key in each else "not set", []).append(rank)
        if len(ranks_of) > 1:
            lines.append(f"{key} is " + " and ".join(f"{text} on {name_ranks(of)}" for text, of in ranks_of.items()))
    more = [f"{len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "; ".join(lines[:_SHOWN] + more)


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(names)}"


def agree_on_start(store: dist.Store, rank: int, facts: Mapping[str, Any], timeout_minutes: float) -> None:
    """Compare what the ranks are about to run, before there is a process group: one of ranks that disagree on its size
    or its back end would never come to be.

    Args:
        store: of all ranks, without keys of an earlier start.
        facts: of this rank, plain values; `world_size` is among them. Equal on all ranks, or nobody goes on.

    Raises:
        DivergenceError: on rank 0, SystemExit on the others, where facts differ.
        UserError: a rank did not come in time.
    """
    store.set(f"facts/{rank}", json.dumps(facts))
    try:
        if rank:
            verdict = store.get("verdict").decode()
            store.add("read", 1)
        else:
            verdict = _verdict([store.get(f"facts/{other}") for other in range(facts["world_size"])])
            store.set("verdict", verdict)
    except dist.DistError:
        come = [other for other in range(facts["world_size"]) if store.check([f"facts/{other}"])]
        missing = [other for other in range(facts["world_size"]) if other not in come]
        raise UserError(
            f"{name_ranks(missing) if missing else 'rank 0'} of {facts['world_size']} did not start within "
            f"engine.timeout_minutes={timeout_minutes:g}; see its own messages, and whether every machine runs the "
            "command with the same number of ranks"
        ) from None
    if verdict and rank:
        raise SystemExit(2)
    if verdict:
        deadline = time.monotonic() + 5  # the others read the verdict from this process
        while store.add("read", 0) < facts["world_size"] - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        raise DivergenceError(
            f"ranks were started differently: {verdict}. Start all of them with the same command, code, settings and "
            "packages"
        )


def _verdict(facts: Sequence[bytes]) -> str:
    """What differs; empty where nothing does."""
    return differences([json.loads(each) for each in facts]) if len(set(facts)) > 1 else ""


class StepAgreement:
    """The largest number over ranks, and whether all will do the same next, asked without waiting.

    It goes through a process group on the host: begun before a step and read after it, it has the whole step to arrive,
    and the device is not asked anything.

    Args:
        timeout_minutes: how long a rank may wait for another.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float) -> None:
        self._ranks, self._number = ranks, 0
        self._choices: Mapping[str, Any] = {}
        self._agreed: torch.Tensor | None = None
        self._group = self._work = None
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def begin(self, number: int, choices: Mapping[str, Any]) -> None:
        """Send to the others.

        Args:
            choices: what shapes the graph of the next step. All ranks must give equal ones; a digest is sent.
        """
        self._number, self._choices = number, choices
        if self._group is not None:
            digest = _digest(choices)
            self._agreed = torch.tensor([number, digest, -digest])
            self._work = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, self._group, async_op=True)

    def end(self) -> int:
        """The largest number.

        Raises:
            DivergenceError: on rank 0, SystemExit on the others, where choices differ.
        """
        if self._group is None:
            return self._number
        with HERE.waiting("the agreement on the next step"):
            self._work.wait()
            number, largest, negated = self._agreed.tolist()
            if largest != -negated:
                self._diverged()
        return number

    def _diverged(self) -> None:
        found: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(found, dict(self._choices), group=self._group)
        if not self._ranks.main:
            raise SystemExit(2)
        raise DivergenceError(
            f"ranks would go on differently and then wait for each other without end: {differences(found)}. All ranks "
            "must run the same code with the same settings on the same data; the last checkpoint is untouched"
        )


def _digest(choices: Mapping[str, Any]) -> int:
    """An integer whose negative also fits into 64 bits."""
    text = json.dumps(choices, sort_keys=True, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
