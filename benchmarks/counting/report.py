"""What a count leaves: a table for each part, one row of figures, and rows in results/step_counts.csv."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .counter import Tally
from .graphs import PLACES
from .parts import PARTS
from .steps import SWITCHES, Setup, StepCount

RESULTS = Path(__file__).resolve().parent.parent / "results" / "step_counts.csv"
PART_RESULTS = RESULTS.with_name("step_parts.csv")
GRAPH_RESULTS = RESULTS.with_name("graph_counts.csv")
KEYS = ("size", "batch", "off", "recompute")
FIGURES = ("forward_flops", "backward_flops", "bytes", "launches", "saved_bytes", "peak_bytes", "state_bytes")

PART_FIGURES = (
    "forward_flops backward_flops forward_bytes backward_bytes forward_launches backward_launches saved_bytes "
    "at_peak_bytes"
).split()
GRAPH_FIGURES = ("launches", *PLACES)


def setting(setup: Setup) -> dict[str, str]:
    """What was counted, in words: the KEYS of a row."""
    off = "all" if setup.off == frozenset(SWITCHES) else " ".join(name for name in SWITCHES if name in setup.off)
    return {"size": setup.size, "batch": setup.batch, "off": off or "none", "recompute": setup.recompute}


def figures(count: StepCount) -> dict[str, int]:
    """The FIGURES of a step, in FLOP, bytes and operations."""
    forward, backward = (_sum(count, phase) for phase in ("forward", "backward"))
    return {
        "forward_flops": forward.flops,
        "backward_flops": backward.flops,
        "bytes": forward.bytes + backward.bytes,
        "launches": forward.launches + backward.launches,
        "saved_bytes": sum(count.saved.values()),
        "peak_bytes": count.peak_bytes,
        "state_bytes": count.state_bytes,
    }


def part_figures(count: StepCount) -> dict[str, dict[str, int]]:
    """Figures of every part."""
    saved, at_peak = _by_part(count.saved.items()), _by_part(count.counter.at_peak.items())
    rows = {}
    for part in PARTS:
        forward, backward = (_sum(count, phase, part) for phase in ("forward", "backward"))
        rows[part] = {
            "forward_flops": forward.flops,
            "backward_flops": backward.flops,
            "forward_bytes": forward.bytes,
            "backward_bytes": backward.bytes,
            "forward_launches": forward.launches,
            "backward_launches": backward.launches,
            "saved_bytes": saved[part],
            "at_peak_bytes": at_peak[part],
        }
    return rows


def print_count(setup: Setup, count: StepCount, top: int) -> None:
    """Table of all parts, and the `top` operations that keep, move and launch most."""
    name = setting(setup)
    title = (
        f"{name['size']}, {name['batch']}, {setup.side} px, off: {name['off']}, recompute: {name['recompute']} "
        "(computed, not measured)"
    )
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for column in ("GFLOP fwd", "bwd", "GB fwd", "bwd", "launches fwd", "bwd", "saved GB", "GB at peak"):
        table.add_column(column, justify="right")
    rows = part_figures(count)
    total = {key: sum(row[key] for row in rows.values()) for key in rows[PARTS[0]]}
    for part, row in rows.items():
        table.add_row(part, *_cells(row))
    table.add_section()
    table.add_row("total", *_cells(total))
    console.print(table)
    state = count.state_bytes
    print(
        f"{(total['forward_flops'] + total['backward_flops']) / 1e12:.2f} TFLOP; "
        f"{(total['forward_bytes'] + total['backward_bytes']) / 1e9:.0f} GB moved; "
        f"{total['forward_launches'] + total['backward_launches']} launches; peak {count.peak_bytes / 1e9:.2f} GB, "
        f"with parameters, AdamW and inputs {(count.peak_bytes + state) / 1e9:.2f} GB"
    )
    if top:
        _print_top(console, count, top)


def print_graph(setup: Setup, host: dict[str, int]) -> dict[str, str | int]:
    """One line, and the row of GRAPH_RESULTS."""
    name, total = setting(setup), sum(host.values())
    places = ", ".join(f"{value} {place.replace('_', ' ')}" for place, value in host.items())
    print(f"{setup.size}, {setup.batch}, CUDA graphs: {total} launches of the host: {places} (computed, not measured)")
    return {**name, "launches": total, **host}


def save_graphs(rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to GRAPH_RESULTS, in place of those of the same setting."""
    _merge(GRAPH_RESULTS, KEYS, GRAPH_FIGURES, rows)


def save(rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to RESULTS, in place of those of the same setting; the parts of steps with everything on or off go to
    PART_RESULTS."""
    _merge(RESULTS, KEYS, FIGURES, rows)
    parts = [
        {**row, "part": part, **row["parts"][part]}
        for row in rows
        if row["off"] in ("all", "none") and row["recompute"] == "none"
        for part in PARTS
    ]
    _merge(PART_RESULTS, (*KEYS, "part"), PART_FIGURES, parts)


def _merge(path: Path, keys: Sequence[str], figures: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            known = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    known |= {tuple(row[key] for key in keys): row for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*keys, *figures], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())


def _sum(count: StepCount, phase: str, part: str | None = None) -> Tally:
    total = Tally()
    for (tally_phase, (tally_part, _)), tally in count.counter.tallies.items():
        if tally_phase == phase and part in (None, tally_part):
            total.add(tally)
    return total


def _by_part(sizes: Iterable[tuple[tuple[str, str], int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for (part, _), size in sizes:
        total[part] += size
    return total


def _cells(row: dict[str, int]) -> list[str]:
    scale = {"flops": 1e9, "bytes": 1e9, "launches": 1}
    digits = {"flops": 1, "bytes": 2, "launches": 0}
    return [f"{value / scale[unit]:.{digits[unit]}f}" for key, value in row.items() for unit in [key.split("_")[-1]]]


def _print_top(console: Console, count: StepCount, top: int) -> None:
    moved: Counter[tuple[str, str]] = Counter()
    launches: Counter[tuple[str, str]] = Counter()
    for (_, place), tally in count.counter.tallies.items():
        moved[place] += tally.bytes
        launches[place] += tally.launches
    sizes = {"GB at the peak": count.counter.at_peak, "GB moved": moved, "launches": launches}
    for title, values in sizes.items():
        table = Table("part", "operation", title=f"largest: {title}", title_justify="left")
        table.add_column(title, justify="right")
        for (part, operation), value in values.most_common(top):
            table.add_row(part, operation, f"{value / 1e9:.2f}" if "GB" in title else str(value))
        console.print(table)
