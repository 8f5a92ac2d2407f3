"""Weak and strong scaling, measured: `python benchmarks/scaling/measure.py --ranks 1 2 --engine torch zero1`.

Starts the trainer through torchrun on each number of ranks with synthetic videos, loading and logging on, and times
every step on every rank (worker.py). Ranks are GPUs with NCCL where torch sees any, else CPU processes with gloo, each
with `--threads` threads. Weak scaling gives every rank `--batch` videos, strong scaling shares `--batch` times the
largest number of ranks among all. Defaults are small enough for a CPU; on a GPU say for instance

    python benchmarks/scaling/measure.py --ranks 1 2 4 8 --size base_plus --side 1024 --frames 8 --objects 3 \\
        --batch 1 --precision bfloat16 --workers 4 --steps 60

On several nodes give the command that starts one process for each rank, `{ranks}` being their number, and a folder that
all nodes share. In a job of Slurm, with MASTER_ADDR and MASTER_PORT exported as in configs/cluster/srun.sbatch:

    --folder /shared/scaling --launcher 'srun --ntasks={ranks} --ntasks-per-node=8 bash -c
        "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python $*" rank'

The last line is one JSON object with all rows. They are added to results/scaling_measured.csv unless --no-save is
given.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from harness.command import OneLineParser  # noqa: E402  (harness first: it makes both packages importable)

from scaling import tables  # noqa: E402
from scaling.command import failure, positive  # noqa: E402
from scaling.engines import SETTINGS  # noqa: E402

WORKER = Path(__file__).with_name("worker.py")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.folder or name).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--folder {folder} cannot be made: {error.strerror}; name a folder")
        _write_data(folder / "data", args)
        rows: list[dict[str, Any]] = []
        for mode in args.mode:
            for engine in args.engine:
                for ranks in sorted(args.ranks):
                    try:
                        rows.append(_measure(args, folder, mode, engine, ranks))
                    except MeasureError as error:
                        print(f"error: {error}", file=sys.stderr)
                        return 2
                    tables.add_efficiency(rows)
                    print(tables.line_of(rows[-1]), flush=True)
                    if not args.no_save:
                        tables.add_rows(tables.MEASURED, rows, tables.MEASURED_KEYS)
    tables.print_measured(rows)
    print(json.dumps({"case": "scaling", "measured": True, "rows": rows}))
    return 0


class MeasureError(RuntimeError):
    """A run that failed, or cannot be started."""


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="measure.py", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=positive, default=[1, 2], help="numbers of ranks")
    parser.add_argument("--engine", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--mode", nargs="+", choices=("weak", "strong"), default=["weak"])
    parser.add_argument("--size", default="micro", help="model.size")
    parser.add_argument("--side", type=positive, default=128, help="of the images, in pixels; a multiple of 32")
    parser.add_argument("--frames", type=positive, default=4, help="of a clip")
    parser.add_argument("--objects", type=positive, default=2, help="of a clip, at most")
    parser.add_argument("--batch", type=positive, default=1, help="videos of a rank")
    parser.add_argument("--steps", type=positive, default=30, help="that are timed")
    parser.add_argument("--warm-up", type=positive, default=6, help="steps before them")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of a rank; 0 loads in the rank itself")
    parser.add_argument("--threads", type=positive, default=1, help="of a rank on a CPU")
    parser.add_argument("--videos", type=positive, default=16, help="that are made to train on")
    parser.add_argument("--launcher", help="starts worker.py on {ranks} ranks; default: torchrun on this machine")
    parser.add_argument("--folder", help="for data and runs; default: a temporary one")
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the config, for example model.compile=true"
    )
    return parser


def _write_data(folder: Path, args: argparse.Namespace) -> None:
    if folder.exists():
        return
    from sam2fast.data.synthetic import write_dataset

    write_dataset(folder, "sav", args.videos, frames=2 * args.frames, size=(args.side, args.side))


def _config(args: argparse.Namespace, folder: Path, batch: int) -> dict[str, Any]:
    data = {"dataset": "videos", "frames": args.frames, "batch_size": batch, "max_objects": args.objects}
    return {
        "name": "scaling",
        "output_dir": str(folder / "run"),
        "device": args.device,
        "precision": args.precision,
        "log_every": 10,
        "model": {"size": args.size, "image_size": args.side},
        "data": {
            "workers": args.workers,
            "datasets": {"videos": {"format": "sav", "root": str(folder.parent / "data")}},
        },
        "stages": [
            {
                "name": "video",
                "steps": args.warm_up + args.steps,
                "data": [data],
                # One kind of step, or the kinds that happen to be drawn would decide.
                "prompts": {"video": {"mask": 1.0, "click": 0.0, "box": 0.0}, "init_frames": 1},
            }
        ],
        "validation": {"every": 0},
        "checkpoint": {"every": 10**6},
    }


def _measure(args: argparse.Namespace, folder: Path, mode: str, engine: str, ranks: int) -> dict[str, Any]:
    batch = args.batch
    if mode == "strong":
        total = args.batch * max(args.ranks)
        if total % ranks:
            raise MeasureError(
                f"strong scaling shares {total} videos, which {ranks} ranks do not divide; change --ranks"
            )
        batch = total // ranks
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = Path(name)
        config = run / "config.yaml"
        config.write_text(json.dumps(_config(args, run, batch)))  # JSON is YAML
        default = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc_per_node {{ranks}}"
        command = _launcher(args.launcher or default, ranks)
        command += [str(WORKER), "--config", str(config)]
        command += [*(f"engine.{name}={value}" for name, value in SETTINGS[engine].items()), *args.overrides]
        environment = {"RECORD": str(run / "record"), "OMP_NUM_THREADS": str(args.threads)}
        if reason := _run(command, environment):
            raise MeasureError(f"--engine {engine} --ranks {ranks}: {reason.removeprefix(f'{config}: ')}")
        records = [run / f"record.{rank}" for rank in range(ranks)]
        if missing := sum(not record.is_file() for record in records):
            raise MeasureError(f"{missing} of {ranks} ranks wrote no times; --launcher must start one process for each")
        found = [json.loads(record.read_text()) for record in records]
    setting = {"mode": mode, "engine": engine, "ranks": ranks, "size": args.size, "side": args.side}
    setting |= {"frames": args.frames, "objects": args.objects, "batch": batch, "precision": args.precision}
    return setting | tables.measured_figures(found, args.warm_up) | tables.origin(found[0]["device"], args.threads)


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Nothing, or why it failed."""
    try:
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    except OSError as error:
        raise MeasureError(f"--launcher cannot be started: {error}; name a command of this machine") from error
    return failure(done.stderr) if done.returncode else ""


def _launcher(text: str, ranks: int) -> list[str]:
    try:
        return shlex.split(text.format(ranks=ranks))
    except (LookupError, ValueError) as error:
        raise MeasureError(
            f"--launcher cannot be read: {error} in {text!r}; close its quotes, use no braces but in {{ranks}}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
