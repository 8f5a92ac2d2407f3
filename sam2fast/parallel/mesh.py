"""The ranks of a run: one process group, set up the same way under deepspeed, torchrun and plain python."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..config import ConfigError, UserError
from .agreement import agree_on_start
from .place import HERE

T = TypeVar("T")

_STILL_BUSY = 1.0
"""Seconds after which a rank tells the others that it is still at work; less than any sensible timeout."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the others."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Of its collectives; None is the default one."""

    def beside(self, timeout_minutes: float) -> Ranks:
        """The same ranks for another thread: in a group of their own, so that a collective never meets one of this
        thread, and over the host's network. Called on every rank, in the same order as other groups are made.

        Args:
            timeout_minutes: how long a collective may wait for a rank.
        """
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            with HERE.waiting("a barrier"):
                dist.barrier(self.group)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of `value` over all ranks (in place; no copy to the host)."""
        if self.world_size > 1:
            with HERE.waiting("a sum over ranks"):
                dist.all_reduce(value, group=self.group)
        return value

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        with HERE.waiting("a broadcast from rank 0"):
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def agree(self, work: Callable[[], T], slow: str = "") -> T:
        """The result of `work`, which every rank calls; a user's mistake on any rank ends all of them with one message.

        Args:
            slow: what it is, where it may take some ranks longer than a collective may wait; it must not use
                collectives of its own.

        Raises:
            UserError: on the first rank that has one; SystemExit on the others.
        """
        try:
            with self._patience(slow) if slow and self.world_size > 1 else nullcontext():
                result, error = work(), None
        except UserError as mistake:
            result, error = None, mistake
        failed = [rank for rank, text in enumerate(self.gather(str(error) if error else None)) if text is not None]
        if failed and failed[0] == self.rank:
            raise error
        if failed:
            raise SystemExit(2)
        return result

    @contextmanager
    def _patience(self, what: str) -> Iterator[None]:
        """Around work that every rank has: nobody goes on before all are done, and no collective waits for long,
        because ranks at work say so all the time. It is for the watchdog to end work that hangs."""
        over, crashed = threading.Event(), False

        def tell() -> list[str]:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # of this thread
            while True:
                busy = not over.wait(_STILL_BUSY)
                states = self.gather("busy" if busy else "crashed" if crashed else "done")
                if "busy" not in states or "crashed" in states:
                    return states

        with ThreadPoolExecutor(1) as pool:
            telling = pool.submit(tell)
            try:
                with HERE.at_work(what):
                    yield
            except BaseException as error:
                crashed = not isinstance(error, UserError)  # `agree` tells the others of those
                raise
            finally:
                over.set()
                with HERE.waiting("slow work of other ranks"):
                    wait([telling])
        if "crashed" in telling.result():  # that rank says why; nobody would answer the next collective
            raise SystemExit(1)

    def gather(self, value: Any) -> list[Any]:
        """Picklable `value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with HERE.waiting("a gathering of all ranks"):
            dist.all_gather_object(values, value, group=self.group)
        return values


def setup(
    device: str = "auto",
    timeout_minutes: float = 30.0,
    local_rank: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Ranks:
    """Join the process group that the launcher describes, or make one of a single process.

    Args:
        device: "cpu", "cuda" or "auto" (cuda where a GPU is present).
        timeout_minutes: how long a collective may wait for a rank before the run fails instead of hanging.
        local_rank: rank on this machine where the launcher passes it as an argument; else LOCAL_RANK is read.
        facts: plain values that must be equal on all ranks, see `agree_on_start`.

    Raises:
        ConfigError: cuda was asked for and no GPU is present.
        UserError: ranks differ in `facts`, number of ranks or kind of device, or one did not start in time; on one
            rank, SystemExit on the others.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device is 'cuda' but torch sees no GPU; set device=cpu, or install a CUDA build of torch")
    kind = "cuda" if device != "cpu" and available else "cpu"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0 if local_rank is None else local_rank)):
        os.environ.setdefault(name, str(default))
    rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if kind == "cuda":
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        store = connect(timeout, serve=rank == 0)
        if world_size > 1:
            facts = {**(facts or {}), "world_size": world_size, "device": kind}
            agree_on_start(dist.PrefixStore("start", store), rank, facts, timeout_minutes)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return Ranks(rank, world_size, local, torch.device(kind, local) if kind == "cuda" else torch.device("cpu"))


def connect(timeout: timedelta, serve: bool = False) -> dist.Store:
    """A new connection to the key-value store of this start at MASTER_ADDR:MASTER_PORT.

    Args:
        timeout: how long it waits for the store and for a key.
        serve: keep the store in this process, unless the launcher does (torchrun).

    Raises:
        UserError: nobody answers there; or, on rank 0 and with SystemExit on the others, ranks would not find each
            other after a restart.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # and then it lives through restarts
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_agent else "0"
    if of_agent and _restarts_on_several_nodes():
        if int(os.environ.get("RANK", 0)):
            raise SystemExit(2)  # rank 0 says why
        raise UserError(
            "torchrun counts restarts on each node by itself, so that after one the ranks would look for each other in "
            "different places: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes and start torchrun with "
            "--rdzv-backend=c10d (others ignore the variable), or leave --max-restarts at 0"
        )
    serve = serve and not of_agent
    try:
        store = dist.TCPStore(
            address, port, is_master=serve, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        what = "cannot be opened" if serve else "does not answer"
        raise UserError(
            f"the meeting point of the ranks, MASTER_ADDR:MASTER_PORT={address}:{port}, {what} "
            f"({str(error).splitlines()[0]}); rank 0 must be running on that machine and its port be free and reachable"
        ) from None
    return dist.PrefixStore(f"attempt_{attempt}", store)


def _restarts_on_several_nodes() -> bool:
    nodes, restarts = (int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    return nodes > 1 and restarts > 0


def teardown() -> None:
    """Leave the process group; a group left to the interpreter's exit can abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
