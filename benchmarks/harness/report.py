"""What a run leaves: a table, one JSON line, and rows in results/<case>.csv."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import FOLDER
from .compare import Result, Row

COLUMNS = (
    "case provider mode shape dtype device threads ms ms_p20 ms_p80 samples gbps copy_gbps peak_bytes "
    "commit torch triton date tflops mfu over_limit"
).split()

ROUNDED = ("ms", "ms_p20", "ms_p80", "gbps", "tflops", "mfu", "over_limit")


def device_name(device: torch.device) -> str:
    """Model of the processor or GPU; nothing that names the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1].strip() if model else platform.machine()


def print_table(result: Result, device: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"{result.case} on {device}, copy bandwidth {result.copy_gbps:.1f} GB/s", title_justify="left")
    for column in ("shape", "mode", "provider"):
        table.add_column(column)
    numbers = ("ms", "p20..p80", "rounds", "GB/s", "of copy", "TFLOP/s", "MFU", "of limit", "extra MB")
    for column in (*numbers, "speedup", "p20..p80", "memory ratio"):
        table.add_column(column, justify="right")
    group = None
    for row in result.rows:
        if group not in (None, (row.shape, row.mode)):
            table.add_section()
        group = (row.shape, row.mode)
        table.add_row(row.shape, row.mode, row.provider, *_cells(row))
    console.print(table)
    for entry in result.skipped:
        print(f"skipped: {' '.join(filter(None, (entry['provider'], entry.get('shape'))))}: {entry['reason']}")


def _cells(row: Row) -> list[str]:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"

    spread = "" if row.speedup_p20 is None else f"{row.speedup_p20:.2f}..{row.speedup_p80:.2f}"
    return [
        f"{row.ms:.4g}",
        f"{row.ms_p20:.4g}..{row.ms_p80:.4g}",
        str(row.samples),
        f"{row.gbps:.3g}",
        f"{100 * row.copy_share:.1f} %",
        "" if row.tflops is None else f"{row.tflops:.3g}",
        "" if row.mfu is None else f"{100 * row.mfu:.1f} %",
        ratio(row.over_limit),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.2f}",
        ratio(row.speedup),
        spread,
        ratio(row.memory_ratio),
    ]


def json_line(result: Result, device: str) -> str:
    return json.dumps(asdict(result) | {"device": device})


def append_csv(result: Result, device: torch.device) -> Path:
    """Add the rows to results/<case>.csv, which keeps every measurement."""
    path = FOLDER / "results" / f"{result.case}.csv"
    path.parent.mkdir(exist_ok=True)
    common = {
        "case": result.case,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "copy_gbps": f"{result.copy_gbps:.4g}",
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for row in result.rows:
            numbers = {name: "" if (value := getattr(row, name)) is None else f"{value:.4g}" for name in ROUNDED}
            writer.writerow(asdict(row) | numbers | common)
    return path


def commit() -> str:
    """Short hash of the checkout, with a + where it has changes; empty outside git."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
