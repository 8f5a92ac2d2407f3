"""Clicks and boxes of the simulated user; their values lie in the section `parts`."""

from __future__ import annotations

from sam2fast.models.prompts import mask_to_box, sample_box, sample_click
from sections import Entry, Floor, Report

CASES = ("center_point", "mask_to_box", "box_points_noise0")
EXACT = Floor()


def check(data: Entry, report: Report) -> None:
    if "center_point" in data:
        case = data["center_point"]
        logits = case["pred"].float() - 0.5
        points, labels = sample_click(case["gt"][:, 0], logits, "center")
        report.at(case="center_point").compare("points", points, case["points"], EXACT)
        report.at(case="center_point").compare("labels", labels, case["labels"], EXACT)
    # Boxes are those of the same masks.
    if "mask_to_box" in data:
        boxes = mask_to_box(data["center_point"]["gt"][:, 0])
        report.at(case="mask_to_box").compare("boxes", boxes[:, None], data["mask_to_box"], EXACT)
    if "box_points_noise0" in data:
        case = data["box_points_noise0"]
        points, labels = sample_box(data["center_point"]["gt"][:, 0], noise=0, bound=0)
        report.at(case="box_points_noise0").compare("points", points, case["coords"], EXACT)
        report.at(case="box_points_noise0").compare("labels", labels, case["labels"], EXACT)
