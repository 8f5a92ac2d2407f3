"""Processes that read data beside the one that trains."""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.forkserver
import os
import threading
from pathlib import Path

import cv2

import sam2fast_kernels


def start_fork_server() -> None:
    """Begin to start what worker processes are forked from, which imports for some seconds; again does nothing.

    Workers are forked from a process of their own, which has imported what they need and shares it with them; this
    one may hold a CUDA context and threads with locks.

    That process must import the packages from where this one did, also from a bare checkout beside an installed
    version. It takes its path from the environment alone, and imports a main module only from Python 3.13 on.
    """
    modules = [f"{__package__}.loaders"]
    if Path(sam2fast_kernels.__file__).parent.name == "kernels":
        modules.insert(0, f"{__name__.partition('.')[0]}.train")  # makes both packages of a checkout importable
    multiprocessing.set_forkserver_preload(modules)
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{before}" if before else root
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start_worker(number: int = 0) -> None:
    """Set up a process that decodes, and end it with the one that started it. The DataLoader gives it a number."""
    cv2.setNumThreads(0)  # the processes are the parallelism
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End this process when the trainer is gone. The watchdog of torch looks at the parent process, which is the fork
    server, and that lives on as long as its workers do."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def is_of_dead_worker(error: Exception) -> bool:
    """A worker that died shows as a RuntimeError of the DataLoader or, where its last batch was on the way, as a broken
    connection; an error that a living worker reports starts with "Caught"."""
    text = str(error)
    return not text.startswith("Caught") and (type(error) is not RuntimeError or "DataLoader worker" in text)
