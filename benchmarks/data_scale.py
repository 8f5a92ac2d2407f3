"""Training from many SA-1B tars and SA-V mp4s: start-up, memory over epochs, and the samples after a kill.

    python benchmarks/data_scale.py --images 2000 --videos 200

Writes synthetic data (once for a folder), trains a micro model for an epoch of each, kills the same run with signal
9 at a random step and continues it. Prints start-up times with and without the index, the memory of trainer and loader
processes in tenths of the run, and whether both runs used the same samples. Exits with 1 where they did not (repeated
steps included), where a record is missing in the epoch, or where memory grew by more than `MOST_GROWTH` over 100 steps
or more. A row for each dataset is added to results/data_scale.csv, which keeps every measurement; `--no-save` leaves it
alone.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sam2fast import train  # noqa: E402, F401  (makes both packages importable)

RECORDER = ROOT / "benchmarks" / "recording_train.py"
SIDE = 64
BATCH = {"images": 10, "videos": 2}
FRAMES = {"images": 1, "videos": 3}
MOST_GROWTH = {"trainer": 40, "largest worker": 10}
"""MiB from the second tenth of an epoch on. Seen: trainers within 23 (644 to 667), workers within 1 (27 to 28)."""
TENTHS = 10
CHECKPOINT_STEPS = 10
"""The first checkpoint takes memory for good, and each for a while, so growth is judged where every tenth has one."""

CONFIG = """
name: scale
output_dir: {output}
device: cpu
log_every: 1
model: {{size: micro, image_size: {side}}}
data:
  workers: {workers}
  datasets: {{images: {{format: sa1b, root: "{data}/images"}}, videos: {{format: sav, root: "{data}/videos"}}}}
stages:
  - {{name: images, steps: {image_steps}, data: [{{dataset: images, batch_size: {images}, max_objects: 2}}],
      prompts: {{correction_clicks: 0}}}}
  - {{name: videos, steps: {video_steps}, data: [{{dataset: videos, batch_size: {videos}, frames: 3}}],
      prompts: {{correction_clicks: 0}}}}
checkpoint: {{every: {every}}}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the data there; default: a temporary folder")
    parser.add_argument("--no-save", action="store_true", help="add no rows to results/data_scale.csv")
    args = parser.parse_args(argv)
    counts = {"images": args.images, "videos": args.videos}
    for name, count in counts.items():
        if count % BATCH[name] or count < TENTHS * BATCH[name]:
            parser.error(f"--{name} must be a multiple of {BATCH[name]}, at least {TENTHS * BATCH[name]}, not {count}")
    from sam2fast.data.synthetic import write_dataset

    with tempfile.TemporaryDirectory() as temporary:
        data = args.folder or Path(temporary) / "data"
        began = time.monotonic()
        write_dataset(data / "images", "sa1b", args.images, size=(96, 128), tar=True)
        write_dataset(data / "videos", "sav", args.videos, frames=4, size=(96, 128))
        print(f"{args.images} images and {args.videos} videos written in {time.monotonic() - began:.0f} s", flush=True)
        started = report_startup(data, args.workers)
        rows, faults = report_run(data, Path(temporary), counts, args.workers)
    for fault in faults:
        print(f"FAULT: {fault}")
    if not args.no_save:
        save([{**rows[name], **started[name], "workers": args.workers} for name in counts])
    return 1 if faults else 0


def save(rows: list[dict[str, object]]) -> None:
    """Add rows to results/data_scale.csv."""
    import torch
    from harness.report import commit, device_name

    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    common = {"device": device_name(torch.device("cpu")), "cores": os.cpu_count(), "commit": commit(), "date": date}
    path = ROOT / "benchmarks" / "results" / "data_scale.csv"
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *common], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(row | common for row in rows)


def report_startup(data: Path, workers: int) -> dict[str, dict[str, str]]:
    """Time to open each dataset, first without an index, and to its first batch."""
    from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
    from sam2fast.data.formats import open_dataset
    from sam2fast.data.loaders import build_loader
    from sam2fast.data.sampling import ClipDataset

    for index in data.rglob("*.members.npz"):
        index.unlink()
    found = {}
    for name, format_name in (("images", "sa1b"), ("videos", "sav")):
        config = DatasetConfig(format=format_name, root=str(data / name))
        seconds = []
        for _ in range(2):
            began = time.monotonic()
            dataset = open_dataset(config, name, seed=0)
            seconds.append(time.monotonic() - began)
        began = time.monotonic()
        clips = ClipDataset(dataset, MixItem(dataset=name, frames=FRAMES[name]), AugmentConfig(), SIDE, seed=0)
        loader = build_loader(clips, BATCH[name], workers=workers)
        next(loader)
        first = time.monotonic() - began
        loader.close()
        index = sum(path.stat().st_size for path in (data / name).rglob("*.members.npz"))
        print(
            f"{name}: opened in {seconds[0]:.2f} s without an index, {seconds[1]:.2f} s with it "
            f"({index / 1e3:.0f} kB); first batch after {first:.1f} s more",
            flush=True,
        )
        found[name] = {
            "open_seconds": f"{seconds[0]:.3f}",
            "open_seconds_with_index": f"{seconds[1]:.3f}",
            "first_batch_seconds": f"{first:.2f}",
        }
    return found


def report_run(
    data: Path, temporary: Path, counts: dict[str, int], workers: int
) -> tuple[dict[str, dict[str, object]], list[str]]:
    """Train whole, and killed and continued; returns what was seen of each dataset, and what should not be."""
    steps = {name: counts[name] // BATCH[name] for name in counts}
    records, commands = [], []
    for name in ("whole", "killed"):
        config = temporary / f"{name}.yaml"
        settings = {
            "side": SIDE,
            "workers": workers,
            "data": data,
            "output": temporary / name,
            "every": CHECKPOINT_STEPS,
            **BATCH,
        }
        config.write_text(CONFIG.format(**settings, image_steps=steps["images"], video_steps=steps["videos"]))
        commands.append([sys.executable, str(RECORDER), "--config", str(config)])
        records.append(temporary / f"{name}.0")  # of the one rank
    began = time.monotonic()
    run(commands[0], records[0])
    print(f"trained in {time.monotonic() - began:.0f} s", flush=True)
    whole = read(records[0])
    grown = {name: report_memory(name, [line for line in whole if line["stage"] == name]) for name in counts}
    kill = random.SystemRandom().randrange(len(whole) // 10, len(whole) * 9 // 10)
    run(commands[1], records[1], kill)
    run(commands[1], records[1])
    wanted = {line["step"]: line["ids"] for line in whole}
    killed = read(records[1])  # steps after the last checkpoint come twice
    equal = {line["step"] for line in killed} == wanted.keys() and all(
        line["ids"] == wanted[line["step"]] for line in killed
    )
    faults = [] if equal else ["the killed run used other samples"]
    rows = {}
    for name in counts:
        ids = [sample_id for line in whole if line["stage"] == name for sample_id in line["ids"]]
        epoch = {sample_id.split("@")[0] for sample_id in ids[: counts[name]]}
        print(f"{name}: {len(epoch)} of {counts[name]} in the epoch")
        if len(epoch) < counts[name]:
            faults.append(f"{name}: an epoch of {len(ids)} samples showed {len(epoch)} of {counts[name]}")
        for label, most in MOST_GROWTH.items():
            if steps[name] >= TENTHS * CHECKPOINT_STEPS and grown[name][label] > most:
                faults.append(f"{name}: memory of the {label} grew by {grown[name][label]:.0f} MiB, more than {most}")
        rows[name] = {
            "name": name,
            "count": counts[name],
            **{f"growth_mib_{label.split()[-1]}": f"{growth:.1f}" for label, growth in grown[name].items()},
            "epoch_complete": len(epoch) == counts[name],
            "same_samples": equal,
        }
    print(f"killed at step {kill}: {'the same' if equal else 'OTHER'} samples in {len(whole)} steps")
    return rows, faults


def report_memory(name: str, lines: list[dict]) -> dict[str, float]:
    """Print memory by tenths of an epoch; returns the MiB that it grew from the second on, of each of `MOST_GROWTH`."""
    import numpy as np

    parts = np.array_split(np.arange(len(lines)), TENTHS)
    trainer = [max(lines[index]["trainer"] for index in part) / 2**20 for part in parts]
    workers = [max((max(lines[index]["workers"], default=0)) for index in part) / 2**20 for part in parts]
    grown = {}
    for label, values in zip(MOST_GROWTH, (trainer, workers), strict=True):
        growth = max(values[2:]) - values[1]
        listed = " ".join(f"{value:.0f}" for value in values)
        print(
            f"{name}, memory of the {label} by tenths of the epoch, MiB: {listed}; from the second on {growth:+.1f}",
            flush=True,
        )
        grown[label] = growth
    return grown


def run(command: list[str], record: Path, kill: int | None = None) -> None:
    """Train; with `kill` until that step is in the record, then end every process at once."""
    import psutil

    environment = {**os.environ, "RECORD": str(record.with_suffix("")), "OMP_NUM_THREADS": "1"}
    log = record.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while kill is not None and process.poll() is None and not any(line["step"] == kill for line in read(record)):
            time.sleep(0.2)
        if kill is not None and process.poll() is None:
            parent = psutil.Process(process.pid)
            for each in [*parent.children(recursive=True), parent]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
    if process.wait() not in (0, -signal.SIGKILL):
        raise SystemExit(f"training failed:\n{log.read_text()[-3000:]}")


def read(record: Path) -> list[dict]:
    if not record.is_file():
        return []
    return [json.loads(line) for line in record.read_text().splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    sys.exit(main())
