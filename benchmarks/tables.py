"""Write the tables of docs/performance.md, docs/scaling.md and docs/checkpoints.md from the files in results/.

    python benchmarks/tables.py

replaces what stands between `<!-- table NAME -->` and `<!-- end -->`. Computed figures come from step_counts.csv and
step_parts.csv and graph_counts.csv, measured ones from step_time.csv and profile_step_h100.csv; docs/scaling.md shows
the files scaling_*.csv, docs/checkpoints.md checkpoint_time.csv.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from scaling.engines import NAMES

FOLDER = Path(__file__).resolve().parent
PAGES = tuple(FOLDER.parent / "docs" / name for name in ("performance.md", "scaling.md", "checkpoints.md"))
SIZES = {"tiny": "T", "base_plus": "B+", "large": "L"}
BATCHES = {"video": "8 frames x 3 objects", "points": "the same, clicked", "image": "image, 64 masks"}
POLICIES = {
    ("all", "none"): "all off",
    ("none", "none"): "all on",
    ("none", "many_masks"): "`recompute=many_masks` (default)",
    ("none", "decoder+trunk+memory"): "`decoder+trunk+memory`",
}
Row = dict[str, str]


def parts(batch: str) -> list[str]:
    """Each part of a step of B+: all off, then all on, nothing recomputed."""
    counted = (row for row in _read("step_parts.csv") if (row["size"], row["batch"]) == ("base_plus", batch))
    rows = {(row["off"], row["part"]): row for row in counted}
    names = [part for off, part in rows if off == "all"]
    if not names:
        raise SystemExit(
            f"step_parts.csv lacks base_plus, {batch}, with everything off: count_step.py --all-off --save"
        )
    lines = ["| part | TFLOP | GB moved | launches | GB kept for the backward pass |", "|---|---|---|---|---|"]
    total = {off: [0.0] * 4 for off in ("all", "none")}
    for name in names:
        pair = [_part_figures(rows[off, name]) for off in ("all", "none")]
        for off, figures in zip(total, pair, strict=True):
            total[off] = [a + b for a, b in zip(total[off], figures, strict=True)]
        if any(any(figures) for figures in pair):
            lines.append(_part_line(name, *pair))
    return [*lines, _part_line("total", *total.values())]


def memory() -> list[str]:
    """Peak memory of every policy, with parameters, AdamW and inputs."""
    counts = _counts()
    lines = ["| | " + " | ".join(POLICIES.values()) + " |", "|---" * (1 + len(POLICIES)) + "|"]
    for size, name in SIZES.items():
        for batch in ("video", "image"):
            peaks = [_peak(counts[size, batch, *policy]) for policy in POLICIES]
            lines.append(f"| {name}, {BATCHES[batch]} | " + " | ".join(f"{peak:.1f}" for peak in peaks) + " |")
    return lines


def graphs() -> list[str]:
    """What the host launches eagerly, without all-reduce and update, and with model.cuda_graphs, with them."""
    counts = _counts()
    lines = ["| step | kernels, launched one by one | launches of the host with graphs |", "|---|---|---|"]
    for row in _read("graph_counts.csv"):
        eager = counts[row["size"], row["batch"], row["off"], row["recompute"]]["launches"]
        figures = (int(eager), int(row["launches"]))
        name = f"{SIZES[row['size']]}, {BATCHES[row['batch']]}"
        lines.append(f"| {name} | " + " | ".join(f"{figure:,}" for figure in figures) + " |")
    return lines


def switches(batch: str) -> list[str]:
    """A step of B+ with one switch off, nothing recomputed, in the order of its traffic."""
    rows = {
        row["off"]: row
        for row in _read("step_counts.csv")
        if (row["size"], row["batch"], row["recompute"]) == ("base_plus", batch, "none")
    }
    order = sorted(rows.keys() - {"none", "all"}, key=lambda name: (-int(rows[name]["bytes"]), name))
    if not order or not {"none", "all"} <= rows.keys():
        raise SystemExit(
            f"step_counts.csv lacks switches of base_plus, {batch}: count_step.py --off NAME --recompute none --save"
        )
    labels = {name: f"`{name}`" for name in order} | {"none": "nothing (all on)", "all": "everything (all off)"}
    lines = ["| left out | TFLOP | GB moved | launches | GB at the peak |", "|---|---|---|---|---|"]
    for name, label in labels.items():
        row = rows[name]
        flops = int(row["forward_flops"]) + int(row["backward_flops"])
        figures = flops / 1e12, int(row["bytes"]) / 1e9, int(row["launches"]), _peak(row)
        lines.append("| {} | {:.2f} | {:.0f} | {:,} | {:.1f} |".format(label, *figures))
    return lines


def ablation(shape: str) -> list[str]:
    """Time and memory with one switch off, against all on, in the last run of a shape."""
    last = {row["provider"]: row for row in _read("step_time.csv") if row["shape"] == shape}
    on = last["all_on"]
    order = sorted(
        (name for name in last if name.startswith("no_")), key=lambda name: float(last[name]["ms"]), reverse=True
    )
    lines = ["| left out | ms | time against all on | MB | memory against all on |", "|---|---|---|---|---|"]
    for name in (*order, "all_on", "all_off"):
        row = last[name]
        time, size = float(row["ms"]), float(row["peak_bytes"])
        label = {"all_on": "nothing (`all_on`)", "all_off": "everything (`all_off`)"}.get(
            name, f"`{name.removeprefix('no_')}`"
        )
        ratios = time / float(on["ms"]), size / float(on["peak_bytes"])
        lines.append(f"| {label} | {time:.0f} | {ratios[0]:.2f} | {size / 1e6:.0f} | {ratios[1]:.2f} |")
    return lines


def times(shape: str) -> list[str]:
    """All off against the rest, in the last run of a shape."""
    last = {row["provider"]: row for row in _read("step_time.csv") if row["shape"] == shape}
    off = last["all_off"]
    lines = ["| provider | s | GB | times faster | times less memory |", "|---|---|---|---|---|"]
    for name, row in last.items():
        if not name.startswith("no_"):
            seconds, size = float(row["ms"]) / 1e3, float(row["peak_bytes"]) / 1e9
            ratios = float(off["ms"]) / float(row["ms"]), float(off["peak_bytes"]) / float(row["peak_bytes"])
            lines.append(f"| `{name}` | {seconds:.3g} | {size:.3g} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return lines


def profile(shape: str) -> list[str]:
    """Steps of a shape on a GPU, in the order they were measured."""
    rows = [row for row in _read("profile_step_h100.csv") if row["shape"] == shape]
    off = next(row for row in rows if row["provider"] == "all_off")
    lines = [
        "| provider | changes | ms | ms until queued | kernels | ms of kernels | GB | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{int(row['peak_bytes']) / 1e9:.1f}" if row["peak_bytes"] else ""
        launches = f"{int(row['launches']):,}" if row["launches"] else ""
        figures = (
            row["ms"],
            row["host_ms"],
            launches,
            row["kernel_ms"],
            size,
            f"{float(off['ms']) / float(row['ms']):.2f}",
        )
        lines.append(f"| `{row['provider']}` | {row['changes']} | " + " | ".join(figures) + " |")
    return lines


def collectives(size: str) -> list[str]:
    """What the step of each engine sends on 256 ranks, beside the least."""
    rows = [row for row in _read("scaling_collectives.csv") if (row["size"], row["world_size"]) == (size, "256")]
    lines = [
        "| engine | collective | while | group | dtype | number | MB of buffers | MB sent | least | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for engine, name in NAMES.items():
        for row in (row for row in rows if row["engine"] == engine and int(row["bytes"]) >= 1e6):
            whole = row["kind"] == "all"
            group = f"{row['ranks']}" + (f", every {row['stride']}th" if row["stride"] not in ("", "1") else "")
            when = row["phase"] + (", overlapped" if row["overlapped"] == "True" else "")
            cells = ["all", "", "", ""] if whole else [row["kind"], when, group, row["dtype"]]
            cells += [row["count"], f"{int(row['bytes']) / 1e6:,.0f}", f"{float(row['sent']) / 1e6:,.0f}"]
            cells += [f"{float(row['least']) / 1e6:,.0f}", f"{float(row['ratio']):.3f}"] if whole else ["", ""]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def predicted(size: str) -> list[str]:
    """Steps of 1 to 256 A100s: milliseconds, of which communication that is not hidden, and efficiencies."""
    rows = [row for row in _read("scaling_predicted.csv") if row["size"] == size]
    known = {(row["engine"], row["objects"], int(row["gpus"])): row for row in rows}
    counts = [count for count in (1, 8, 64, 256) if any(key[2] == count for key in known)]
    lines = ["| engine | " + " | ".join(f"{count} GPUs" for count in counts) + " | objects vary | GB |"]
    lines.append("|---" * (len(counts) + 3) + "|")
    for engine, name in NAMES.items():
        own = {count: known[engine, "equal", count] for count in counts if (engine, "equal", count) in known}
        if not own:
            continue
        cells = [
            f"{float(row['ms']):.0f} ({float(row['ms_communication']):.1f}), {float(row['efficiency']):.3f}"
            for row in own.values()
        ]
        last = max(own)
        cells += [f"{float(known[engine, 'vary', last]['efficiency']):.3f}", f"{float(own[last]['memory_gb']):.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cpu_ranks() -> list[str]:
    """Measured CPU ranks beside their prediction."""
    lines = [
        "| engine | ms, 1 rank | ms, 2 ranks, measured | predicted | of it communication | error |",
        "|---" * 6 + "|",
    ]
    for row in _read("scaling_checked.csv"):
        cells = [f"{float(row[key]):.0f}" for key in ("ms_one_rank", "ms_measured", "ms_predicted", "ms_communication")]
        lines.append(f"| {NAMES[row['engine']]} | " + " | ".join(cells) + f" | {100 * float(row['error']):+.0f} % |")
    return lines


def scaling(mode: str) -> list[str]:
    """What measure.py measured, weak or strong scaling."""
    rows = [row for row in _read("scaling_measured.csv") if row["mode"] == mode]
    lines = [
        "| engine | ranks | ms | p95 | variation between ranks | frame-objects/s | efficiency | MB |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        cells = [row["ranks"], f"{float(row['ms']):.0f}", f"{float(row['ms_p95']):.0f}"]
        cells += [f"{100 * float(row['variation']):.0f} %", f"{float(row['frame_objects_per_s']):.2f}"]
        cells += [f"{float(row['efficiency']):.2f}", f"{float(row['peak_mb']):.0f}"]
        lines.append(f"| {NAMES[row['engine']]} | " + " | ".join(cells) + " |")
    return lines


def checkpoint_time() -> list[str]:
    """What checkpoint_time.py measured."""
    lines = [
        "| size | ranks | GB | synchronous, s | asynchronous: stall, s | share | first stall, s | written after, s |",
        "|---" * 8 + "|",
    ]
    for row in _read("checkpoint_time.csv"):
        times = [f"{float(row[key]):.2f}" for key in ("synchronous_s", "stall_s")]
        later = [f"{float(row[key]):.2f}" for key in ("first_stall_s", "written_after_s")]
        cells = [
            SIZES[row["size"]],
            row["ranks"],
            f"{float(row['GB']):.2f}",
            *times,
            f"{float(row['ratio']):.1%}",
            *later,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


TABLES: dict[str, Callable[..., list[str]]] = {
    "parts": parts,
    "memory": memory,
    "graphs": graphs,
    "switches": switches,
    "ablation": ablation,
    "times": times,
    "profile": profile,
    "collectives": collectives,
    "predicted": predicted,
    "checkpoint_time": checkpoint_time,
    "cpu_ranks": cpu_ranks,
    "scaling": scaling,
}


def main() -> int:
    pattern = re.compile(r"<!-- table (\w+) ?(\S*) -->\n.*?<!-- end -->", re.DOTALL)

    def fill(match: re.Match[str]) -> str:
        name, argument = match.groups()
        table = TABLES[name](argument) if argument else TABLES[name]()
        return "\n".join([f"<!-- table {name}{f' {argument}' if argument else ''} -->", *table, "<!-- end -->"])

    for page in PAGES:
        partial = page.with_suffix(".partial")
        partial.write_text(pattern.sub(fill, page.read_text()))
        os.replace(partial, page)
        print(page.relative_to(FOLDER.parent))
    return 0


def _read(name: str) -> list[Row]:
    with (FOLDER / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _counts() -> dict[tuple[str, str, str, str], Row]:
    return {(row["size"], row["batch"], row["off"], row["recompute"]): row for row in _read("step_counts.csv")}


def _peak(row: Row) -> float:
    return (int(row["peak_bytes"]) + int(row["state_bytes"])) / 1e9


def _part_figures(row: Row) -> list[float]:
    """TFLOP, GB moved, launches, GB kept."""
    flops, moved, started = (
        int(row[f"forward_{unit}"]) + int(row[f"backward_{unit}"]) for unit in ("flops", "bytes", "launches")
    )
    return [flops / 1e12, moved / 1e9, float(started), int(row["saved_bytes"]) / 1e9]


def _part_line(name: str, before: list[float], after: list[float]) -> str:
    form = ("{:.2f}", "{:.0f}", "{:,.0f}", "{:.2f}")
    cells = [f"{f.format(a)} → {f.format(b)}" for f, a, b in zip(form, before, after, strict=True)]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
