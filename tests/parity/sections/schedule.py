"""The cosine schedule of the official fine-tuning configuration, a case of the section `parts`."""

from __future__ import annotations

from sam2fast.optim import learning_rate
from sections import Floor, Report
from sections.groups import MOSE


def check(data: list, report: Report) -> None:
    """Enter the learning rates at the recorded [position of training (0 to 1), rate]."""
    ours = [[position, MOSE.lr * learning_rate(MOSE, position, total_steps=1)] for position, _ in data]
    report.compare("lr", ours, data, Floor(relative=1e-15))
