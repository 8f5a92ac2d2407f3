"""Rows of the scaling benchmarks: figures, files in results/, tables on the screen."""

from __future__ import annotations

import csv
import datetime
import fcntl
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness.report import commit, device_name
from harness.timing import quantile
from rich.console import Console
from rich.table import Table

from .collectives import Collective

RESULTS = Path(__file__).resolve().parents[1] / "results"
MEASURED = RESULTS / "scaling_measured.csv"
COLLECTIVES = RESULTS / "scaling_collectives.csv"
TRACES = RESULTS / "scaling_traces.jsonl"
PREDICTED = RESULTS / "scaling_predicted.csv"
NETWORK = RESULTS / "scaling_network.csv"
CHECKED = RESULTS / "scaling_checked.csv"
MEASURED_KEYS = "mode engine ranks size side frames objects batch precision device threads".split()
COLLECTIVE_KEYS = ("engine", "size", "world_size")
FIELDS = tuple(Collective.__dataclass_fields__)
Row = dict[str, Any]


def measured_figures(ranks: Sequence[Mapping[str, Any]], warm_up: int) -> Row:
    """Figures of a run from what its ranks wrote.

    `variation` is that of forward passes between ranks in a step, as a share of their mean, averaged over steps: what
    ranks do before they first wait for each other, where weights are not sharded. `jitter` is that between steps of one
    rank.
    """
    steps = [rank["steps"][warm_up:] for rank in ranks]
    seconds = [step["seconds"] for rank in steps for step in rank]
    slowest = [max(rank[i]["seconds"] for rank in steps) for i in range(len(steps[0]))]
    forwards = [[rank[i]["forward"] for rank in steps] for i in range(len(steps[0]))]
    elapsed = sum(slowest)
    return {
        "ms": 1e3 * quantile(seconds, 0.5),
        "ms_p95": 1e3 * quantile(seconds, 0.95),
        "ms_loading": 1e3 * statistics.fmean(step["loading"] for rank in steps for step in rank),
        "variation": statistics.fmean(statistics.pstdev(row) / statistics.fmean(row) for row in forwards),
        "jitter": statistics.fmean(_spread([step["seconds"] for step in rank]) for rank in steps),
        "videos_per_s": sum(step["videos"] for rank in steps for step in rank) / elapsed,
        "frame_objects_per_s": sum(step["frame_objects"] for rank in steps for step in rank) / elapsed,
        "peak_mb": max(rank["peak_bytes"] for rank in ranks) / 1e6,
        "steps": len(slowest),
    }


def _spread(seconds: Sequence[float]) -> float:
    """Standard deviation as a share, from the middle half, so that single hiccups do not make it."""
    return (quantile(seconds, 0.75) - quantile(seconds, 0.25)) / 1.349 / quantile(seconds, 0.5)


def add_efficiency(rows: list[Row]) -> None:
    """Throughput of a rank against that of one rank alone, where that was measured."""
    alone = {(row["mode"], row["engine"]): row["videos_per_s"] for row in rows if row["ranks"] == 1}
    for row in rows:
        one = alone.get((row["mode"], row["engine"]))
        row["efficiency"] = row["videos_per_s"] / row["ranks"] / one if one else ""


def origin(device: str, threads: int) -> Row:
    """Where and when something was measured."""
    cpu = device == "cpu"
    return {
        "device": device_name(torch.device("cpu")) if cpu else device,
        "threads": threads if cpu else "",
        "cores": len(os.sched_getaffinity(0)) if cpu else "",
        "commit": commit(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def line_of(row: Row) -> str:
    return (
        f"{row['mode']} {row['engine']} on {row['ranks']}: {row['ms']:.0f} ms, {row['videos_per_s']:.2f} videos/s, "
        f"{row['peak_mb']:.0f} MB"
    )


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a file in results/; none where it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_rows(path: Path, rows: Iterable[Row], keys: Sequence[str]) -> None:
    """Add rows to a file in results/, in place of those with the same keys."""
    rows = [{name: _text(value) for name, value in row.items()} for row in rows]
    new = {tuple(row[key] for key in keys) for row in rows}
    columns = list(rows[0])
    partial = path.with_suffix(".partial")
    with _alone(path):
        kept = [row for row in read(path) if tuple(row[key] for key in keys) not in new]
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *rows])
        os.replace(partial, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process that adds to the same file does so meanwhile."""
    with (Path(tempfile.gettempdir()) / f"sam2fast-{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def save_trace(traced: Any, frames: int) -> None:
    """Add a program.Trace to TRACES, in place of one of the same engine, size and number of ranks."""
    line = {name: getattr(traced, name) for name in ("engine", "size", "world_size", "parameters", "tensors")}
    line |= {"state_bytes": traced.state_bytes, "frames": frames, "fields": FIELDS}
    line["collectives"] = [[_compact(getattr(one, name)) for name in FIELDS] for one in traced.collectives]
    same = (line["engine"], line["size"], line["world_size"])
    partial = TRACES.with_suffix(".partial")
    with _alone(TRACES):
        kept = [old for old in _lines() if (old["engine"], old["size"], old["world_size"]) != same]
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in [*kept, line]))
        os.replace(partial, TRACES)


def _compact(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _lines() -> list[dict]:
    return [json.loads(line) for line in TRACES.read_text().splitlines()] if TRACES.is_file() else []


def read_traces() -> list[dict]:
    """Traces as dictionaries, `collectives` being Collective objects."""
    found = _lines()
    for line in found:
        line["collectives"] = [Collective(**dict(zip(line["fields"], one, strict=True))) for one in line["collectives"]]
    return found


def print_measured(rows: Sequence[Row]) -> None:
    columns = {
        "ms": "ms",
        "ms_p95": "p95",
        "ms_loading": "loading",
        "variation": "variation",
        "videos_per_s": "videos/s",
        "frame_objects_per_s": "frame-objects/s",
        "efficiency": "efficiency",
        "peak_mb": "MB",
    }
    table = Table("mode", "engine", "ranks", title="measured", title_justify="left")
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in rows:
        cells = [f"{row[name]:.3g}" if row[name] != "" else "" for name in columns]
        table.add_row(row["mode"], row["engine"], str(row["ranks"]), *cells)
    console().print(table)


def print_collectives(rows: Sequence[Row]) -> None:
    table = Table(title="collectives of a step (computed, not measured)", title_justify="left")
    for name in ("size", "engine", "phase", "kind", "dtype", "group", "overlapped"):
        table.add_column(name)
    for name in ("count", "MB", "MB sent", "least", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        group = f"{row['ranks']} by {row['stride']}" if row["ranks"] else f"of {row['world_size']}"
        cells = [row["size"], row["engine"], row["phase"], row["kind"], row["dtype"], group, str(row["overlapped"])]
        cells += [str(row["count"]), f"{row['bytes'] / 1e6:.4g}", f"{row['sent'] / 1e6:.4g}"]
        cells += [f"{row['least'] / 1e6:.4g}", f"{row['ratio']:.3f}"] if row["least"] else ["", ""]
        table.add_row(*cells, end_section=row["kind"] == "all")
    console().print(table)


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)
