"""Draw docs/scaling.png from results/scaling_predicted.csv, scaling_checked.csv, scaling_measured.csv and
profile_step_h100.csv: `python benchmarks/scaling/plot.py`, or with --out another file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from harness.command import OneLineParser  # noqa: E402  (harness first: it makes both packages importable)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from scaling import compute, engines, tables  # noqa: E402

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "scaling.png"
SIZES = {"base_plus": "B+", "large": "L"}
NAMES = engines.NAMES | {"torch": "torch (DDP)"}
COLORS = dict(
    zip(NAMES, ("black", "tab:blue", "tab:cyan", "tab:green", "tab:red", "tab:orange", "tab:purple"), strict=True)
)
COLUMNS = {
    "frame_objects_per_s": "frame-objects/s",
    "efficiency": "throughput of a GPU / of one alone",
    "memory_gb": "GB on a GPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="plot.py", description="Draw the curves of docs/scaling.md from results/.")
    parser.add_argument("--out", type=_png, default=OUTPUT, help="the image, .png; default: docs/scaling.png")
    args = parser.parse_args(argv)
    predicted = tables.read(tables.PREDICTED)
    if not predicted:
        parser.error("results/scaling_predicted.csv is missing: python benchmarks/scaling/predict.py")
    try:
        draw(predicted, tables.read(tables.CHECKED), args.out)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written: {error.strerror}; choose a file in a folder that is there")
    print(args.out)
    return 0


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, not {text!r}")
    return Path(text)


def draw(predicted: list[dict[str, str]], checked: list[dict[str, str]], output: Path) -> None:
    """Curves for each size of the model, and a panel of CPU ranks where there are some."""
    sizes = [size for size in SIZES if any(row["size"] == size for row in predicted)]
    height = len(sizes) + bool(checked)
    figure = Figure(figsize=(12, 3.4 * height + 0.9), layout="constrained")
    grid = figure.add_gridspec(height, 3)
    for line, size in enumerate(sizes):
        for column, (figure_name, label) in enumerate(COLUMNS.items()):
            axes = figure.add_subplot(grid[line, column])
            _curves(axes, [row for row in predicted if row["size"] == size], figure_name)
            axes.set_ylabel(label, fontsize=8)
            axes.set_title(f"{SIZES[size]}: predicted for A100s", fontsize=9)
            if figure_name == "frame_objects_per_s" and size == "base_plus":
                _measured_gpu(axes)
            if not line and not column:
                axes.legend(fontsize=6)
    if checked:
        _cpu_ranks(figure.add_subplot(grid[height - 1, :]), checked)
    figure.supxlabel(_caption(predicted), fontsize=7, x=0.01, ha="left")
    partial = output.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    os.replace(partial, output)


def _curves(axes: Axes, rows: list[dict[str, str]], name: str) -> None:
    """Lines, since they are predictions: solid with equal numbers of objects, dotted where they vary."""
    for engine, label in NAMES.items():
        for objects, style in (("equal", "-"), ("vary", ":")):
            own = [row for row in rows if (row["engine"], row["objects"]) == (engine, objects)]
            if not own or (objects == "vary" and name != "efficiency"):
                continue
            x, y = [int(row["gpus"]) for row in own], [float(row[name]) for row in own]
            axes.plot(x, y, style, color=COLORS[engine], linewidth=1, label=label if objects == "equal" else None)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if name == "frame_objects_per_s":
        axes.set_yscale("log", base=2)
    elif name == "efficiency":
        axes.set_ylim(0.8, 1.01)
    else:
        axes.set_ylim(0)


def _measured_gpu(axes: Axes) -> None:
    rate = compute.FRAMES * compute.OBJECTS / compute.measured_step()["seconds"]
    axes.plot([1], [rate], "*", color="tab:red", markersize=11, linestyle="none", label="measured: one H100")


def _cpu_ranks(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Filled circles are measured, crosses predicted."""
    names = [f"{NAMES[row['engine']]}, {row['ranks']} ranks" for row in rows]
    axes.plot(names, [float(row["ms_one_rank"]) for row in rows], "o", color="0.6", label="measured, one rank")
    axes.plot(
        names, [float(row["ms_measured"]) for row in rows], "o", color="tab:blue", label="measured, several ranks"
    )
    axes.plot(
        names, [float(row["ms_predicted"]) for row in rows], "x", color="tab:red", label="predicted from one rank"
    )
    axes.set_ylim(0)
    axes.set_ylabel("ms a step", fontsize=8)
    axes.set_title("CPU ranks with gloo, weak scaling, micro model", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _caption(predicted: list[dict[str, str]]) -> str:
    factor = float(predicted[0]["factor"])
    return (
        "Lines are predicted: nothing was run on more than one GPU, nor on an A100. Weak scaling, 8 frames and at most "
        "3 objects a GPU, 1024 px, bfloat16, nothing recomputed; no data loading.\n"
        f"Compute: counted FLOPs and bytes at the A100's peak rates x {factor:.2f}, the factor by which a step of B+ "
        "on one H100 (star) missed the H100's. Network: 227 GB/s in a node,\n192 GB/s between nodes of 8 A100s, "
        "latencies of benchmarks/scaling/network.py; collectives of a trace, rescaled (docs/scaling.md). Ranks vary by "
        "1.5 % (assumed); solid: 3 objects on every GPU; dotted: 1, 2 or 3 at random."
    )


if __name__ == "__main__":
    sys.exit(main())
