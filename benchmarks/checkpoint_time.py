"""What a checkpoint costs a run: the time of one that is waited for, and the stall by one that is written beside.

    python benchmarks/checkpoint_time.py --sizes tiny large --ranks 1 2

A model of each size with random weights and moments of AdamW is saved by the code that training uses, on a CPU, to a
folder on this disk (checksums and fsync included, as in training). A step of training is a matrix product on one thread
for each rank. The stall of an asynchronous checkpoint is the time of the call, in which the state is copied; "slower
steps" is what the steps lose while the file is written, to writers that share their processors and memory. The first
asynchronous checkpoint also obtains the memory for the copies and is listed apart. Prints a table and, as its last
line, JSON; rows go to results/checkpoint_time.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.report import commit, device_name  # noqa: E402

from sam2fast import train  # noqa: E402, F401  (makes both packages importable)
from sam2fast.models.architecture import SIZES  # noqa: E402

SIDE, PRODUCTS, BASELINE = 1024, 4, 15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "large"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each kind (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="disk to write to; default: the one for temporary files")
    parser.add_argument("--no-save", action="store_true", help="leave results/checkpoint_time.csv alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.rounds, args.folder)
    rows = []
    for size in args.sizes:
        for ranks in args.ranks:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                rows.append(launch(size, ranks, args.rounds, folder))
    columns = list(rows[0])
    widths = [max(len(name), *(len(_text(row[name])) for row in rows)) for name in columns]
    for values in (columns, *([_text(row[name]) for name in columns] for row in rows)):
        print("  ".join(text.rjust(width) for text, width in zip(values, widths, strict=True)))
    if not args.no_save:
        _append(rows)
    print(json.dumps({"rows": rows, "largest_ratio": max(row["ratio"] for row in rows)}))
    return 0


def launch(size: str, ranks: int, rounds: int, folder: str) -> dict:
    """A row of the table, measured by `ranks` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    command += ["--worker", size, "--rounds", str(rounds), "--folder", folder]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def work(size: str, rounds: int, folder: Path) -> int:
    """Measure on this rank; rank 0 prints the row."""
    from sam2fast.checkpoint import CheckpointStore
    from sam2fast.config import Config, EngineConfig, OptimConfig
    from sam2fast.optim import build_groups
    from sam2fast.parallel import EngineState, build_engine, setup, teardown
    from sam2fast.recipe import build_model
    from sam2fast.run_state import RunState

    stage = {"name": "none", "steps": 1, "data": [{"dataset": "none"}], "prompts": {"init_frames": 1}}
    config = Config.model_validate({
        "name": "checkpoint_time",
        "output_dir": str(folder),
        "model": {"size": size},
        "data": {"datasets": {"none": {"root": str(folder)}}},
        "stages": [stage],
        "checkpoint": {"keep": 1},
    })  # fmt: skip
    ranks = setup("cpu")
    optim = OptimConfig()
    model = build_model(config)
    engine = build_engine(EngineConfig(kind="torch"), optim, ranks, model, build_groups(model, optim), "float32", 1,
                          rebuild=lambda: model)  # fmt: skip
    moments = {
        name: {"exp_avg": torch.randn_like(param), "exp_avg_sq": torch.rand_like(param), "step": torch.tensor(1.0)}
        for name, param in model.named_parameters()
    }
    engine.load_state(EngineState(model.state_dict(), moments))
    size_bytes = sum(value.nbytes for value in EngineState(model.state_dict(), moments).tensors().values())
    matrix = torch.randn(SIDE, SIDE)
    step = torch.no_grad()(lambda: [matrix @ matrix for _ in range(PRODUCTS)])
    usual = statistics.median(_seconds(step) for _ in range(BASELINE))
    count = 0

    def save(store: CheckpointStore) -> float:
        nonlocal count
        count += 1
        ranks.barrier()
        return _seconds(lambda: store.save(engine, RunState(global_step=count)))

    waiting = CheckpointStore(_with(config, asynchronous=False), ranks)
    beside = CheckpointStore(_with(config, asynchronous=True), ranks)
    blocking, calls, slower, written = [], [], [], []
    for _ in range(rounds):
        blocking.append(save(waiting))
    for _ in range(rounds + 1):
        calls.append(save(beside))
        began, steps = time.monotonic(), []
        while beside.writing:
            steps.append(_seconds(step))
        written.append(time.monotonic() - began)
        slower.append(sum(steps) - usual * len(steps))
        beside.wait()
    row = {
        "size": size,
        "ranks": ranks.world_size,
        "GB": size_bytes / 1e9,
        "synchronous_s": statistics.median(blocking),
        "first_stall_s": calls[0],
        "stall_s": statistics.median(calls[1:]),
        "ratio": statistics.median(calls[1:]) / statistics.median(blocking),
        "written_after_s": statistics.median(written[1:]),
        "slower_steps_s": statistics.median(slower[1:]),
        "usual_step_s": usual,
    }
    if ranks.main:
        print(json.dumps(row), flush=True)
    ranks.barrier()
    teardown()
    return 0


def _with(config, asynchronous: bool):
    section = config.checkpoint.model_copy(update={"asynchronous": asynchronous})
    return config.model_copy(update={"checkpoint": section})


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _append(rows: list[dict]) -> None:
    path = ROOT / "benchmarks" / "results" / "checkpoint_time.csv"
    common = {
        "device": device_name(torch.device("cpu")),
        "commit": commit(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *common], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} | common for row in rows)


if __name__ == "__main__":
    sys.exit(main())
