"""How long the compute of a step takes on a GPU that was not there: counted work at stated rates, times what a measured
GPU needed more than that.

Counted work is that of results/step_parts.csv (count_step.py): for every part of the model and each pass FLOPs at the
peak rate or bytes at the memory's rate, whichever takes longer. Measured is a step of B+ on one H100
(results/profile_step_h100.csv), replayed as a CUDA graph. Kernels are taken to miss these limits by the same factor on
an A100, and for other sizes of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import tables

FRAMES, OBJECTS = 8, 3
PER_FRAME = ("trunk", "neck")
"""Parts of the model that cost the same whatever the number of objects; the others cost as much again for each."""


@dataclass(frozen=True)
class Gpu:
    """Peak rates of data sheets: dense bfloat16 in FLOP/s, memory in bytes/s."""

    flops: float
    bytes: float


GPUS = {"A100": Gpu(312e12, 2.039e12), "H100": Gpu(989e12, 3.35e12)}
"""80 GB, SXM."""


def counted_seconds(size: str, gpu: Gpu) -> dict[str, float]:
    """Of each part, for a video step of 8 frames and 3 objects with all optimizations on, if nothing is lost.

    Raises:
        LookupError: the step was not counted.
    """
    rows = [
        row
        for row in tables.read(tables.RESULTS / "step_parts.csv")
        if (row["size"], row["batch"], row["off"], row["recompute"]) == (size, "video", "none", "none")
    ]
    if not rows:
        raise LookupError(
            f"results/step_parts.csv has no video step of {size}: "
            f"python benchmarks/count_step.py --size {size} --recompute none --save"
        )
    return {
        row["part"]: sum(
            max(float(row[f"{way}_flops"]) / gpu.flops, float(row[f"{way}_bytes"]) / gpu.bytes)
            for way in ("forward", "backward")
        )
        for row in rows
    }


def measured_step() -> dict[str, float]:
    """Seconds of the last measured video step of B+ on an H100, and how much longer that is than counted."""
    rows = tables.read(tables.RESULTS / "profile_step_h100.csv")
    last = [row for row in rows if row["shape"].startswith("B+-maskx3") and row["provider"] == "all_on_graphs"][-1]
    seconds = float(last["ms"]) / 1e3
    return {"seconds": seconds, "factor": seconds / sum(counted_seconds("base_plus", GPUS["H100"]).values())}


def seconds_of_objects(size: str, gpu: Gpu, factor: float) -> dict[int, float]:
    """Seconds of a step by the number of objects, 1 to 3."""
    parts = counted_seconds(size, gpu)
    fixed = sum(parts[name] for name in PER_FRAME)
    each = (sum(parts.values()) - fixed) / OBJECTS
    return {objects: factor * (fixed + objects * each) for objects in range(1, OBJECTS + 1)}


def object_probabilities(mean: float = 3.0) -> dict[int, float]:
    """Of 1, 2 and 3 objects in a clip: a Poisson variable that is at least 1, cut at 3. Assumed."""
    poisson = {k: mean**k * math.exp(-mean) / math.factorial(k) for k in range(3)}
    some = 1 - poisson[0]
    return {1: poisson[1] / some, 2: poisson[2] / some, 3: 1 - (poisson[1] + poisson[2]) / some}
