"""The log of a run: TensorBoard events, and one JSON line per log interval beside them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"
TENSORBOARD_NAME = "tensorboard"


class RunLog:
    """Writes scalars of one run. A resumed run drops what was logged after the step that it continues from.

    Args:
        run_dir: folder of the run; the log is `log.jsonl` and the folder `tensorboard` in it.
        enabled: false on all ranks but the first, where nothing is written.
        resume_step: global step of the checkpoint that the run continues from; 0 starts the log anew.
    """

    def __init__(self, run_dir: str | os.PathLike, enabled: bool = True, resume_step: int = 0) -> None:
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _drop_after(folder / LOG_NAME, resume_step)
        self._file = (folder / LOG_NAME).open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=resume_step + 1, flush_secs=30)
        self._last = time.monotonic()

    def scalars(self, step: int, values: Mapping[str, float], stage: str = "") -> None:
        """Log values by tag at a global step. The JSON line also holds the `seconds` since the one before it."""
        if not self._enabled:
            return
        now = time.monotonic()
        line: dict[str, Any] = {"step": step, "stage": stage, "seconds": round(now - self._last, 3)}
        self._last = now
        # JSON has no NaN and no infinity; null is a gap in the curve.
        line |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._writer.close()


def read_log(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Lines of a run's log in the order written; empty without a log. A line cut off by a crash is left out."""
    path = Path(run_dir) / LOG_NAME
    if not path.is_file():
        return []
    return [line for text in path.read_text(encoding="utf-8").splitlines() if (line := _parse(text)) is not None]


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`: all of them or, should this be interrupted, the file as it was."""
    if not path.is_file():
        return
    before = path.read_text(encoding="utf-8", errors="replace")
    lines = [text for text in before.splitlines() if (line := _parse(text)) is not None and line["step"] <= step]
    after = "".join(f"{text}\n" for text in lines)
    if after != before:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(after, encoding="utf-8")
        partial.replace(path)


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
