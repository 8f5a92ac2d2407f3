"""Processes that read data beside the one that trains."""

from __future__ import annotations

import errno
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2

import sam2fast_kernels

from ..signals import STOP_SIGNALS
from .in_flight import InFlight


def start_fork_server() -> None:
    """Begin to start what worker processes are forked from, which imports for some seconds; again does nothing.

    Workers are forked from a process of their own, which has imported what they need and shares it with them; this
    one may hold a CUDA context and threads with locks.

    That process must import the packages from where this one did, also from a bare checkout beside an installed
    version. It takes its path from the environment alone, and imports a main module only from Python 3.13 on.

    Signals that ask a run to stop often reach all its processes; those started here, and those forked from them, have
    them blocked and go on until the run lets go of them.
    """
    modules = [f"{__package__}.loaders"]
    if Path(sam2fast_kernels.__file__).parent.name == "kernels":
        modules.insert(0, f"{__name__.partition('.')[0]}.train")  # makes both packages of a checkout importable
    multiprocessing.set_forkserver_preload(modules)
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{before}" if before else root
    try:
        with _blocked_signals():
            multiprocessing.resource_tracker.ensure_running()  # itself, starting, unblocks some
        with _blocked_signals():
            multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start_worker() -> None:
    """Set up a process that decodes, and end it with the one that started it."""
    cv2.setNumThreads(0)  # the processes are the parallelism
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as the fork server has, in case another started this
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    threading.Thread(target=_end_by_trainer, daemon=True).start()


def start_loader(in_flight: InFlight, number: int) -> None:
    """`start_worker` for worker `number` of a DataLoader; from now on `in_flight` tells when it has ended."""
    in_flight.clear(number)
    start_worker()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """New processes inherit what is blocked; a signal to this one waits until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_by_trainer() -> None:
    """End this process when the trainer itself sends SIGTERM, as it does to workers that do not end in time."""
    trainer = multiprocessing.parent_process().pid
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != trainer:
        pass
    os._exit(1)


def _end_with_trainer() -> None:
    """End this process when the trainer is gone. The watchdog of torch looks at the parent process, which is the fork
    server, and that lives on as long as its workers do."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def is_of_dead_worker(error: Exception, in_flight: InFlight) -> bool:
    """Whether a DataLoader raised `error` because one of its workers, which `start_loader` set up, has died.

    That shows as a RuntimeError of the DataLoader or, where its last batch was on the way, as a broken connection, to
    the thread that pins memory too. What living workers report starts with "Caught"; others are of this process.
    """
    text = str(error)
    if type(error) is RuntimeError and "DataLoader worker" in text:
        return True
    broken = type(error) is not RuntimeError or "Pin memory thread exited" in text
    return broken and not text.startswith("Caught") and not lacks_descriptors(error) and in_flight.some_dead()


def lacks_descriptors(error: Exception) -> bool:
    """Whether this process may not open more files; each tensor that a worker hands over takes a descriptor."""
    return "Too many open files" in str(error) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
