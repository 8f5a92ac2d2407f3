"""Injects faults into short runs of two ranks and prints what happened: exit code, seconds until all processes had
ended, what the user read, and how many steps are lost when the same command goes on.

    python tests/train/fault_table.py [--only NAME ...] [--out FILE.md]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from forked import Launch, environment

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sam2fast import train  # noqa: E402, F401  (first: it makes both packages importable)
from sam2fast.checkpoint import CheckpointStore  # noqa: E402
from sam2fast.config_file import load_config  # noqa: E402
from sam2fast.data.synthetic import write_dataset  # noqa: E402
from sam2fast.parallel import setup  # noqa: E402
from sam2fast.parallel.mesh import free_port  # noqa: E402
from sam2fast.run_folder import RunFolder  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DEEPSPEED = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
FAULT_AT = 5
"""Steps that are done when the fault comes; checkpoints are of every third."""

CONFIG = """
name: faults
output_dir: ???
device: cpu
log_every: 1
model: {size: micro, image_size: 64}
data:
  root: ???
  workers: 0
  datasets: {videos: {format: sav, root: "${data.root}"}}
stages:
  - name: video
    steps: 1000
    data: [{dataset: videos, frames: 3, batch_size: 1, max_objects: 2}]
    prompts: {correction_clicks: 1}
    optim: {schedule: constant}
checkpoint: {every: 3}
"""


@dataclass
class Started:
    """A run: two ranks, or a launcher that starts them."""

    process: Launch | subprocess.Popen
    output: Path

    @property
    def printed(self) -> Path:
        """What a launcher and its ranks wrote."""
        return self.output.with_suffix(".txt")

    def step(self) -> int:
        """The last one in the log."""
        log = self.output / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def ranks(self) -> list[psutil.Process]:
        """Its training processes, in the order of their ranks."""
        if isinstance(self.process, Launch):
            return [psutil.Process(pid) for pid in self.process.pids]
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            rank = process.environ().get("RANK")
            if rank is not None and "forkserver" not in " ".join(process.cmdline()):
                found.setdefault(int(rank), process)
        return [found[rank] for rank in sorted(found)]

    def family(self) -> list[psutil.Process]:
        """All processes of it that there are now."""
        pids = self.process.pids if isinstance(self.process, Launch) else [self.process.pid]
        roots = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        return [*roots, *(child for root in roots for child in root.children(recursive=True))]

    def result(self) -> tuple[str, str]:
        """Exit codes and what was printed."""
        if isinstance(self.process, Launch):
            done = self.process.wait()
            return ", ".join(map(str, self.process.codes)), done.stdout + done.stderr
        return str(self.process.returncode), self.printed.read_text()


@dataclass
class Fault:
    """How a fault is made."""

    name: str
    inject: Callable[[Started], object] | None = None
    """Called when step `FAULT_AT` is in the log; without it the run makes the fault itself."""
    fault: str = ""
    """See faulty_train.py."""
    overrides: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)
    before: Callable[[Path], object] | None = None
    """Prepares the run folder."""
    after: Callable[[Path], object] | None = None
    """Mends the run folder before the command is given again."""


def of_rank(rank: int, number: int) -> Callable[[Started], object]:
    return lambda run: run.ranks()[rank].send_signal(number)


def kill_loader(run: Started) -> None:
    servers = [each for rank in run.ranks() for each in rank.children() if "forkserver" in " ".join(each.cmdline())]
    next(worker for server in servers for worker in server.children()).kill()


def mount(output: Path) -> None:
    """Checkpoints on another file system, as far as the run sees."""
    (output / "mount").mkdir(parents=True)
    (output / "checkpoints").symlink_to(output / "mount")


def damage_newest(run: Started) -> None:
    for rank in run.ranks():
        rank.send_signal(signal.SIGTERM)
    run.process.wait()
    newest = sorted((run.output / "checkpoints").glob("step_*"))[-1]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


def faults() -> list[Fault]:
    quick = "engine.timeout_minutes=0.5"
    return [
        Fault("SIGTERM to all ranks", lambda run: [rank.send_signal(signal.SIGTERM) for rank in run.ranks()]),
        Fault("SIGTERM to torchrun", lambda run: run.process.send_signal(signal.SIGTERM), launcher=TORCHRUN),
        Fault("SIGUSR1 to rank 1, torchrun", of_rank(1, signal.SIGUSR1), launcher=TORCHRUN),
        Fault("kill -9 of rank 0, torchrun", of_rank(0, signal.SIGKILL), launcher=TORCHRUN),
        Fault("kill -9 of rank 1, torchrun", of_rank(1, signal.SIGKILL), launcher=TORCHRUN),
        Fault("kill -9 of rank 1, deepspeed", of_rank(1, signal.SIGKILL), launcher=DEEPSPEED),
        Fault("kill -9 of rank 1, torchrun --max-restarts=1", fault=f"kill:1:{FAULT_AT}",
              overrides=["stages.0.steps=8"], launcher=[*TORCHRUN, "--max-restarts=1"]),
        Fault("kill -9 of torchrun", lambda run: run.process.kill(), launcher=TORCHRUN),
        Fault("disk full while saving", fault=f"full:0:{FAULT_AT}"),
        Fault("folder that cannot be written", overrides=["output_dir=/sys/run"]),
        Fault("file system of checkpoints lost", lambda run: (run.output / "mount").rename(run.output / "gone"),
              before=mount, after=lambda output: (output / "gone").rename(output / "mount")),
        Fault("newest checkpoint damaged", damage_newest),
        Fault("loss not finite", fault=f"nan:1:{FAULT_AT}", overrides=["max_bad_steps=3"]),
        Fault("rank with another seed", fault="seed:1:0"),
        Fault("rank that draws another prompt", fault=f"plan:1:{FAULT_AT}"),
        Fault("rank that stalls, torchrun", fault=f"stall:1:{FAULT_AT}", overrides=[quick, "engine.stall_minutes=0.1"],
              launcher=TORCHRUN),
        Fault("out of memory", fault=f"memory:1:{FAULT_AT}"),
        Fault("loader process killed", kill_loader, overrides=["data.workers=1"]),
    ]  # fmt: skip


def start(fault: Fault, config: Path, data: Path, output: Path) -> Started:
    launcher = fault.launcher
    if launcher is DEEPSPEED:
        launcher = [*launcher, "--master_port", str(free_port())]
    script = ROOT / ("tests/train/faulty_train.py" if fault.fault else "sam2fast/train.py")
    arguments = [str(script), "--config", str(config), f"data.root={data}", f"output_dir={output}", *fault.overrides]
    env = {**environment(), "FAULT": fault.fault, "FAULT_ONCE": str(output / "killed")}
    if not launcher:
        return Started(Launch(arguments, 2, output.parent, env), output)
    with output.with_suffix(".txt").open("w") as file:
        command = [*launcher, *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=output.parent)
    return Started(process, output)


def row(fault: Fault, config: Path, data: Path, folder: Path) -> list[str]:
    """Make one fault happen; the cells of the table."""
    output = folder / "run"
    output.mkdir(parents=True)
    if fault.before:
        fault.before(output)
    run, processes, began = start(fault, config, data, output), {}, 0.0
    while run.process.poll() is None:
        with contextlib.suppress(psutil.Error):
            processes |= {each.pid: each for each in run.family()}
        if not began and run.step() >= FAULT_AT:
            began = time.monotonic()
            if fault.inject:
                fault.inject(run)
        time.sleep(0.2)
    _, alive = psutil.wait_procs(list(processes.values()), timeout=120)
    took = f"{time.monotonic() - began:.0f} s" if began else "at the step" if run.step() else "at the start"
    for each in alive:
        each.kill()
    code, printed = run.result()
    said = messages(printed, folder) + (["processes had to be killed"] if alive else [])
    if fault.after:
        fault.after(output)
    reached, goes_on, warning = continuation(run, printed)
    return [fault.name, code, took, "<br>".join(said + warning), str(reached - goes_on)]


def continuation(run: Started, printed: str) -> tuple[int, int, list[str]]:
    """The steps that were done, the one where the same command goes on (or where the launcher already made it do so),
    and what it says of checkpoints."""
    if went_on := re.search(r"continuing at step (\d+)", printed):
        return FAULT_AT, int(went_on[1]), []
    if not (run.output / "config.yaml").exists():
        return 0, 0, []  # it did not begin
    store = CheckpointStore(load_config(run.output / "config.yaml"), setup("cpu"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        state, _ = RunFolder(run.output).find_state(store)
    return max(run.step(), FAULT_AT), state.global_step, messages(said.getvalue(), run.output.parent)


def messages(printed: str, folder: Path) -> list[str]:
    """What is for the user among the lines of launcher and ranks, without the paths of this machine."""
    signs = (
        "error: ",
        "watchdog: ",
        "stopped after",
        "ends because",
        "damaged",
        "update skipped",
        "continuing at step",
    )
    lines = [line for line in printed.splitlines() if any(sign in line for sign in signs)]
    lines = [line for line in lines if not line.startswith(("[20", "W", "E", "[W", "[E", "Traceback"))]
    if "Traceback" in printed and not lines:
        lines.append("a traceback")
    clean = [line.replace(f"{folder}/", "").replace(os.uname().nodename, "HOST").replace("|", "/") for line in lines]
    return list(dict.fromkeys(re.sub(r"process \d+", "process PID", line) for line in clean))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="faults whose name contains one of these")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    lines = ["| fault | exit code | all ended after | what the user reads | steps lost |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        write_dataset(folder / "data", "sav", 3, seed=1, frames=6, size=(96, 128))
        for number, fault in enumerate(faults()):
            if args.only is None or any(text in fault.name for text in args.only):
                lines.append(f"| {' | '.join(row(fault, config, folder / 'data', folder / str(number)))} |")
                print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
