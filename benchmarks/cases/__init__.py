"""One module for each case, which holds it as `CASE`."""

from __future__ import annotations

import importlib

from harness.case import Case

NAMES = (
    "mask_loss",
    "click_sampling",
    "upsample",
    "memory_attention",
    "rle",
    "image_step",
    "step_time",
    "dataloader",
)


def load(name: str) -> Case:
    """
    Raises:
        ValueError: there is no such case.
    """
    if name not in NAMES:
        raise ValueError(f"unknown case {name!r}; valid: {', '.join(NAMES)}")
    return importlib.import_module(f".{name}", __package__).CASE
