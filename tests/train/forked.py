"""Training processes that start at once: each is forked from one that has imported everything and does nothing else.

A run through this differs from one through a launcher in its start alone: every rank is a process of its own, with the
environment that torchrun gives it. Tests of the launchers use the launchers.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

import psutil

MODULES = [
    "sam2fast.recipe",
    "sam2fast.parallel.zero",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # brings the code generator of torch.compile, seconds of it
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.utils.tensorboard",
]
"""What a run imports, most of it when it is needed."""


class Launch:
    """`arguments` on `ranks` processes. They write into files, so that a full pipe stops none of them."""

    def __init__(self, arguments: list[str], ranks: int, cwd: Path, env: dict[str, str]) -> None:
        self.arguments, self.server = arguments, start_server()
        self.folder = tempfile.TemporaryDirectory()
        request = {"arguments": arguments, "ranks": ranks, "cwd": str(cwd), "env": env, "output": self.folder.name}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.pids: list[int] = json.loads(self.server.stdout.readline())
        self.code: int | None = None
        self.codes: list[int] = []
        """Exit codes of the ranks, once all have ended."""
        self.waiting = threading.Thread(target=self._wait)
        self.waiting.start()

    def _wait(self) -> None:
        self.codes = json.loads(self.server.stdout.readline())
        self.code = next((code for code in self.codes if code), 0)

    def poll(self) -> int | None:
        """The exit code once all ranks have ended: the first that is not 0."""
        return self.code

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        self.waiting.join(timeout)
        if self.code is None:
            kill(self.pids)
            self.waiting.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        out, err = (self._printed(name) for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.arguments, self.code, out, err)

    def _printed(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(Path(self.folder.name).glob(f"{name}.*")))


def environment() -> dict[str, str]:
    """A user's shell: no packages on the path but the installed ones, two threads in all."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "RANK", "LOCAL_", "WORLD_", "MASTER_"))
    }
    tools = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": tools}


def kill(pids: list[int]) -> None:
    """Kill processes and everything that they started."""
    for pid in pids:
        if not psutil.pid_exists(pid):
            continue
        for each in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            try:
                each.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass


@cache
def start_server() -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=environment())
    atexit.register(server.communicate)  # which ends it
    return server


def serve() -> None:
    """Fork the ranks of one launch after the other; answer with their ids, and with their exit codes when they end."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "sam2fast" / "train.py"))  # this checkout, and no other
    for module in MODULES:
        __import__(module)
    from sam2fast.parallel.mesh import free_port

    while line := sys.stdin.readline():
        request, port, pids = json.loads(line), str(free_port()), []
        for rank in range(request["ranks"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                return become(request, str(rank), port)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def become(request: dict, rank: str, port: str) -> None:
    """Do what a new Python process does with these arguments."""
    files = [(0, os.devnull, os.O_RDONLY)]
    for number, name in ((1, "stdout"), (2, "stderr")):
        files.append((number, f"{request['output']}/{name}.{rank}", os.O_WRONLY | os.O_CREAT))
    for number, path, flags in files:
        os.dup2(os.open(path, flags), number)
    os.chdir(request["cwd"])
    ranks = str(request["ranks"])
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(request["env"] | variables)
    sys.argv = request["arguments"]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve()
