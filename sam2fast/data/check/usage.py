"""The configuration that trains on a dataset that was checked."""

from __future__ import annotations

import glob
from typing import Any

import yaml

from .summary import CLIP_LENGTHS, Summary

_MOST_OBJECTS = 64  # of an image, as in the first stage of SAM 2


def config_lines(summary: Summary, name: str) -> str:
    """YAML of a run that trains on the dataset, called `name`; empty where nothing of it can be used.

    Items with errors are excluded, and so are videos that are too short for the clips, which have 8 frames or, where
    half of the videos are shorter than that, the largest length that half of them have.
    """
    frames, excluded = _clip_length(summary), unusable(summary)
    if not summary.usable or summary.sound <= len(summary.short.keys() & set(excluded) - _broken(summary)):
        return ""
    dataset: dict[str, Any] = {"format": summary.config.format, "root": summary.config.root}
    for key in ("annotations", "sav_annotations"):
        if key in summary.config.model_fields_set and getattr(summary.config, key):
            dataset[key] = getattr(summary.config, key)
    if excluded:
        dataset["exclude"] = [glob.escape(item) for item in excluded]
    item: dict[str, Any] = {"dataset": name}
    if frames > 1:
        item |= {"frames": frames, "batch_size": 1, "max_objects": 3}
    else:
        item |= {"batch_size": 1, "max_objects": max(1, min(_MOST_OBJECTS, max(summary.objects, default=1)))}
    lines = ["name: " + _flow(name), "data:", "  datasets:", f"    {_flow(name)}: {_flow(dataset)}"]
    lines += ["stages:", "  - name: train", "    steps: 1000", "    data:", f"      - {_flow(item)}"]
    if summary.checked < summary.total:
        rest = summary.total - summary.checked
        lines.insert(0, f"# {rest:,} {summary.noun} have not been checked; those with defects are not in `exclude`")
    return "\n".join(lines) + "\n"


def unusable(summary: Summary) -> list[str]:
    """Names of the items that training cannot use: with errors, or shorter than the clips."""
    frames = _clip_length(summary)
    return sorted(_broken(summary) | {item for item, annotated in summary.short.items() if annotated < frames})


def _broken(summary: Summary) -> set[str]:
    return {defect.item for defect in summary.errors if defect.item}


def _clip_length(summary: Summary) -> int:
    if not summary.is_video:
        return 1
    lengths = sorted(summary.lengths.elements())
    usual = lengths[(len(lengths) - 1) // 2] if lengths else 0
    # a clip needs more frames than the two that are prompted by default
    return min(CLIP_LENGTHS[0], usual) if usual > 2 else 1


def _flow(value: Any) -> str:
    """YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()
