"""What a GPU could do at most: peak arithmetic, and computed times of a step whose kernels reach their limits."""

from __future__ import annotations

import torch

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
"""Dense bfloat16 products, from the vendor's data sheets, by a part of the device's name."""
FUSED_STEP_MS = {
    ("T", "image"): {"A100": 27, "H100": 12},
    ("S", "image"): {"A100": 28, "H100": 12},
    ("B+", "image"): {"A100": 32, "H100": 14},
    ("L", "image"): {"A100": 47, "H100": 20},
    ("T", "video"): {"A100": 129, "H100": 48},
    ("S", "video"): {"A100": 135, "H100": 51},
    ("B+", "video"): {"A100": 162, "H100": 62},
    ("L", "video"): {"A100": 265, "H100": 101},
}
"""Forward and backward pass at 1024 px in bfloat16, of an image with 64 masks and 8 clicks or a clip of 8 frames and 3
objects, if every product and every attention were one kernel with everything elementwise fused into it, at the peak
rates of arithmetic and memory, with the official number of FLOPs. Computed; a step with fewer FLOPs can be faster."""


def device_key(device: torch.device) -> str | None:
    """Which entry of the tables a device is."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((key for key in PEAK_TFLOPS if key in name), None)
