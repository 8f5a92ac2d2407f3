"""Draw docs/performance.png from results/step_counts.csv (computed) and results/step_time.csv (measured).

python benchmarks/plot_steps.py
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
OUTPUT = FOLDER.parent / "docs" / "performance.png"
SIZES = {"tiny": "T", "base_plus": "B+", "large": "L"}
POLICIES = {
    ("all", "none"): "all off",
    ("none", "none"): "all on",
    ("none", "many_masks"): "+ recompute many_masks",
    ("none", "decoder+trunk+memory"): "+ trunk, memory",
}
COLORS = ("0.6", "tab:blue", "tab:cyan", "tab:green")
ABLATION_SHAPE = "T-mask@256"


def main() -> int:
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (flops, ablation), (video, image) = figure.subplots(2, 2)
    counts = {
        (row["size"], row["batch"], row["off"], row["recompute"]): row
        for row in _rows(FOLDER / "results/step_counts.csv")
    }
    _bars(flops, counts, "video", lambda row: (int(row["forward_flops"]) + int(row["backward_flops"])) / 1e12)
    flops.set_title("Arithmetic of a video step, 1024 px (computed)", fontsize=9)
    flops.set_ylabel("TFLOP")
    for axes, batch, title in (
        (video, "video", "8 frames, 3 objects"),
        (image, "image", "image, 64 masks"),
    ):
        _bars(axes, counts, batch, lambda row: (int(row["peak_bytes"]) + int(row["state_bytes"])) / 1e9)
        axes.set_title(f"Peak memory, {title}, 1024 px, bfloat16 (computed)", fontsize=9)
        axes.set_ylabel("GB")
    _ablation(ablation, _rows(FOLDER / "results/step_time.csv"))
    flops.legend(fontsize=8)
    figure.savefig(OUTPUT, dpi=110)
    print(OUTPUT.relative_to(FOLDER.parent))
    return 0


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _bars(axes: Axes, counts: dict, batch: str, value) -> None:
    width = 0.8 / len(POLICIES)
    for place, ((off, recompute), label) in enumerate(POLICIES.items()):
        heights = [value(counts[size, batch, off, recompute]) for size in SIZES]
        bars = axes.bar(
            [x + place * width for x in range(len(SIZES))], heights, width, label=label, color=COLORS[place]
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks([x + 0.3 for x in range(len(SIZES))], SIZES.values())


def _ablation(axes: Axes, rows: list[dict[str, str]]) -> None:
    """The last measured time of every provider, slowest on top, against that with everything off of the same run."""
    last = {row["provider"]: float(row["ms"]) / 1000 for row in rows if row["shape"] == ABLATION_SHAPE}
    names = sorted(last, key=last.get)
    axes.barh(names, [last[name] for name in names], color=["tab:blue" if n == "all_on" else "0.6" for n in names])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("s")
    device = next((f"{row['device']}, {row['threads']} threads" for row in rows if row["shape"] == ABLATION_SHAPE), "")
    axes.set_title(f"Step of {ABLATION_SHAPE}, float32 (measured: {device})", fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
