"""What a run has come to, for a person: curves as PNG and a summary table, both read from the run's log."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..config import BASELINE_SUFFIX
from .bad_data import BAD_DATA_NAME, Listed, read_bad_data
from .run_log import LOG_NAME, TENSORBOARD_NAME, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_NAME = "curves"
TOTAL = "train/loss"
TERMS = {
    "train/focal_loss": "focal",
    "train/dice_loss": "dice",
    "train/iou_loss": "IoU",
    "train/object_score_loss": "object score",
    "train/temporal_loss": "temporal",
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9")
"""Okabe and Ito's palette, told apart with any color vision; its yellow darkened for lines on white."""
SMOOTHING = 0.05
"""Share of a curve that each point of its smoothed line averages."""
FILES = {
    "export": "weights in the official layout, whole and split",
    "stages": "weights at the end of each stage",
    "checkpoints": "state to resume from",
    "config.yaml": "resolved configuration",
    CURVES_NAME: "loss and metric curves",
    "overlays": "predictions drawn on validation clips",
    BAD_DATA_NAME: "videos and images that could not be used",
    LOG_NAME: "log",
    TENSORBOARD_NAME: "TensorBoard log",
}

LISTED = 20
"""Most videos and images that could not be used that the summary shows; the file has all."""

Points = tuple[np.ndarray, np.ndarray]
"""Steps and values of one tag."""


def write_curves(run_dir: str | os.PathLike) -> list[Path]:
    """Draw curves/losses.png (a column for each stage) and curves/metrics.png (a panel for each validation metric).

    Returns:
        The files written; none for what the log does not hold.
    """
    lines = read_log(run_dir)
    folder = Path(run_dir) / CURVES_NAME
    figures = {"losses.png": _loss_figure(lines), "metrics.png": _metric_figure(lines)}
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.partial"
        figure.savefig(partial, format="png", dpi=120)
        written.append(partial.replace(folder / name))
    return written


def summarize(run_dir: str | os.PathLike) -> Table:
    """Stages (steps, time, losses), metrics beside their baselines, what could not be used of the data, and where the
    files of a run lie."""
    lines = read_log(run_dir)
    summary = Table.grid(padding=(1, 0, 0, 0))
    summary.add_row(_stage_table(lines))
    if _metrics(lines):
        summary.add_row(_metric_table(lines))
    if bad := read_bad_data(run_dir):
        summary.add_row(_bad_table(bad))
    summary.add_row(_file_table(Path(run_dir)))
    return summary


def _stage_table(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Training", title_justify="left")
    table.add_column("stage")
    for column in ("steps", "time", "first loss", "last loss", "best loss", "at step"):
        table.add_column(column, justify="right")
    end_before = 0
    for stage in _stages(lines):
        own = [line for line in lines if line["stage"] == stage]
        end = max(line["step"] for line in own)
        seconds = sum(line.get("seconds", 0.0) for line in own)
        steps, losses = _points(own, TOTAL)
        row = [stage, str(end - end_before), str(timedelta(seconds=round(seconds)))]
        if len(losses):
            best = int(losses.argmin())
            row += [f"{losses[0]:.4g}", f"{losses[-1]:.4g}", f"{losses[best]:.4g}", str(steps[best])]
        table.add_row(*row)
        end_before = end
    return table


def _metric_table(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Validation", title_justify="left")
    table.add_column("metric")
    for column in ("first", "last", "best", "at step", "baseline", "last - baseline"):
        table.add_column(column, justify="right")
    for tag in _metrics(lines):
        steps, values = _points(lines, tag)
        best = int(values.argmax())
        row = [tag, f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{values[best]:.4g}", str(steps[best])]
        _, baseline = _points(lines, tag + BASELINE_SUFFIX)
        if len(baseline):
            row += [f"{baseline[-1]:.4g}", f"{values[-1] - baseline[-1]:+.4g}"]
        table.add_row(*row)
    return table


def _bad_table(bad: Sequence[Listed]) -> Table:
    counts = Counter(record.dataset for record in bad)
    listed = ", ".join(f"{count} of {dataset}" for dataset, count in counts.items())
    table = Table(title=f"Videos and images that could not be used: {listed}", title_justify="left")
    for column in ("dataset", "name", "reason"):
        table.add_column(column, overflow="fold")
    for record in bad[:LISTED]:
        table.add_row(Text(record.dataset), Text(record.name), Text(record.reason))
    if len(bad) > LISTED:
        table.add_row("", f"and {len(bad) - LISTED} more", f"see {BAD_DATA_NAME}")
    return table


def _file_table(run_dir: Path) -> Table:
    table = Table(title="Files", title_justify="left")
    table.add_column("path", overflow="fold")
    table.add_column("holds")
    for name, content in FILES.items():
        if (run_dir / name).exists():
            table.add_row(str(run_dir / name), content)
    return table


def _loss_figure(lines: Sequence[dict[str, Any]]) -> Figure | None:
    """Above the weighted sum that is minimized, below its unweighted terms; stages side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    by_stage = {stage: [line for line in lines if line["stage"] == stage] for stage in _stages(lines)}
    by_stage = {stage: own for stage, own in by_stage.items() if len(_points(own, TOTAL)[1])}
    if not by_stage:
        return None
    figure = Figure(figsize=(2 + 4.5 * len(by_stage), 7), layout="constrained")
    panels = figure.subplots(2, len(by_stage), sharex="col", sharey="row", squeeze=False)
    colors = dict(zip(TERMS, COLORS, strict=False))
    for (stage, own), (total, terms) in zip(by_stage.items(), panels.T, strict=True):
        _draw_smoothed(total, _points(own, TOTAL), "black", "total")
        for tag, label in TERMS.items():
            points = _points(own, tag)
            if np.any(points[1] > 0):  # switched off otherwise
                _draw_smoothed(terms, points, colors[tag], label)
        total.set_title(stage)
        terms.set_xlabel("step")
        for panel in (total, terms):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            _tidy(panel)
    panels[0, 0].set_ylabel("weighted sum of the losses")
    panels[1, 0].set_ylabel("unweighted terms")
    handles = {
        label: line for panel in panels[1] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _metric_figure(lines: Sequence[dict[str, Any]]) -> Figure | None:
    from matplotlib.figure import Figure

    metrics = _metrics(lines)
    if not metrics:
        return None
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(1 + 4.5 * columns, 0.5 + 3.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    starts = [max(line["step"] for line in lines if line["stage"] == stage) for stage in _stages(lines)[:-1]]
    for tag, color in zip(metrics, (COLORS[i % len(COLORS)] for i in range(len(metrics))), strict=True):
        panel = next(panels)
        panel.plot(*_points(lines, tag), color=color, marker="o", markersize=4, label="model")
        steps, baseline = _points(lines, tag + BASELINE_SUFFIX)
        if len(baseline) == 1:
            panel.axhline(baseline[0], color="0.4", linestyle="--", label="baseline")
        elif len(baseline):
            panel.plot(steps, baseline, color="0.4", linestyle="--", label="baseline")
        for start in starts:
            panel.axvline(start, color="0.5", linestyle=":", linewidth=1.2, zorder=0)
        panel.set_title(tag.removeprefix("val/"))
        panel.set_xlim(left=0)
        panel.set_xlabel("step (dotted: a new stage begins)" if starts else "step")
        if len(baseline):
            panel.legend(frameon=False)
        _tidy(panel)
    for panel in panels:
        panel.set_visible(False)
    return figure


def _draw_smoothed(panel: Axes, points: Points, color: str, label: str) -> None:
    """The values faintly and their centered moving average over them."""
    steps, values = points
    half = round(SMOOTHING * len(values) / 2)
    sums = np.concatenate(([0.0], values.cumsum()))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    panel.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    panel.plot(steps, (sums[high] - sums[low]) / (high - low), color=color, linewidth=1.8, label=label)


def _tidy(panel: Axes) -> None:
    panel.grid(color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _stages(lines: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["stage"] for line in lines))


def _metrics(lines: Sequence[dict[str, Any]]) -> list[str]:
    tags = dict.fromkeys(tag for line in lines for tag in line if tag.startswith("val/"))
    return [tag for tag in tags if not tag.endswith(BASELINE_SUFFIX) and len(_points(lines, tag)[1])]


def _points(lines: Sequence[dict[str, Any]], tag: str) -> Points:
    """Steps and finite values of a tag."""
    points = [(line["step"], line[tag]) for line in lines if line.get(tag) is not None]
    return np.array([step for step, _ in points], dtype=int), np.array([value for _, value in points], dtype=float)
