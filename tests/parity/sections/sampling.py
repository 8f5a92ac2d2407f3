"""Orders of the official data loaders; their values lie in the section `parts`."""

from __future__ import annotations

from sam2fast.data.mixture import official_order, repeat_indices
from sections import Entry, Report

REPEAT_FACTORS = (2.0, 1.5, 0.25, 1.0)
"""Of the dataset whose epochs the file lists."""


def check(data: Entry, report: Report) -> None:
    """Enter whether mixing of datasets and repetition of items agree."""
    if "mixed_loader" in data:
        mixed = data["mixed_loader"]
        ours = official_order(mixed["lens"], mixed["prob"], mixed["seed"])
        report.at(case="mixed_loader").equal("order", ours, mixed["order"])
    if "repeat_factor" in data:
        for epoch, expected in data["repeat_factor"].items():
            report.at(case="repeat_factor").equal(f"epoch {epoch}", repeat_indices(REPEAT_FACTORS, epoch), expected)
