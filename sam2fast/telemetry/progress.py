"""Progress of a run for the person who watches it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar

LINE_INTERVAL = 5.0
"""Least seconds between two lines where the output is not a terminal."""


class Progress:
    """A bar on a terminal; elsewhere (log files, pipes) plain lines.

    Args:
        total: steps of the whole run.
        start: steps done before, in a resumed run.
        enabled: false on all ranks but the first, where nothing is shown.
        console: where to write; standard output if not given.
        interval: least seconds between two plain lines.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        interval: float = LINE_INTERVAL,
    ) -> None:
        self._total, self._start, self._enabled = total, start, enabled
        self._console = console or Console()
        self._interval = interval
        self._began = time.monotonic()
        self._printed = float("-inf")
        self._values: dict[str, float] = {}
        self._bar: ProgressBar | None = None
        if enabled and self._console.is_terminal:
            self._bar = ProgressBar(
                TextColumn("{task.fields[stage]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total, completed=start, stage="", status="")
            self._bar.start()

    def update(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Show that `step` steps of the run are done.

        Args:
            values: by tag (train/loss, lr/base, perf/samples_per_s are shown); what is not given keeps its last value.
        """
        if not self._enabled:
            return
        self._values |= values
        status = "  ".join(self._status(step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, stage=stage, status=status)
            return
        now = time.monotonic()
        if now - self._printed >= self._interval or step == self._total:
            self._printed = now
            self._line(f"{stage}  step {step}/{self._total}  {status}")

    def message(self, text: str) -> None:
        """Show a line of text above the bar."""
        if self._enabled:
            self._line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _status(self, step: int) -> list[str]:
        shown = (("train/loss", "loss {:.4g}"), ("lr/base", "lr {:.2e}"), ("perf/samples_per_s", "{:.3g} samples/s"))
        parts = [text.format(self._values[tag]) for tag, text in shown if tag in self._values]
        if step > self._start:
            left = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        return parts

    def _line(self, text: str) -> None:
        # Off a terminal rich would wrap lines at 80 columns.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
