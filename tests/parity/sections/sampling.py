"""Orders of the official data loaders, two cases of the section `parts`."""

from __future__ import annotations

from sam2fast.data.mixture import official_order, repeat_indices
from sections import Entry, Report

CASES = ("mixed_loader", "repeat_factor")
REPEAT_FACTORS = (2.0, 1.5, 0.25, 1.0)
"""Of the dataset whose epochs the file lists; it records only what they lead to."""


def check(data: Entry, report: Report) -> None:
    """Enter both cases, where the section has them."""
    for case, compare in (("mixed_loader", mixed_loader), ("repeat_factor", repeat_factor)):
        if case in data:
            compare(data[case], report.at(case=case))


def mixed_loader(data: Entry, report: Report) -> None:
    """Enter whether loaders of the recorded lengths are visited in the recorded order."""
    report.equal("order", official_order(data["lens"], data["prob"], data["seed"]), data["order"])


def repeat_factor(data: Entry, report: Report) -> None:
    """Enter whether each epoch repeats the same items."""
    for epoch, expected in data.items():
        report.equal(f"epoch {epoch}", repeat_indices(REPEAT_FACTORS, epoch), expected)
