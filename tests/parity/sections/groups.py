"""Learning rate and weight decay of every parameter at the start of the official MOSE fine-tuning."""

from __future__ import annotations

import torch

from sam2fast.config import OptimConfig
from sam2fast.models.architecture import architecture
from sam2fast.models.official import to_official
from sam2fast.models.sam2 import SAM2
from sam2fast.optim import build_groups, learning_rate
from sections import Entry, Floor, OracleError, Report

RATE = Floor(relative=2e-16)
"""Both sides multiply the same float64 numbers, in another order."""
MOSE = OptimConfig(lr=5e-6, encoder_lr=3e-6, layer_decay=0.9, weight_decay=0.1, schedule="cosine", final_scale=0.1)
SIZES = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}


def check(data: Entry, report: Report) -> None:
    for size, want in data.items():
        if size not in SIZES:
            raise OracleError(f"{want.path}: unknown model size; known: {', '.join(SIZES)}")
        with torch.device("meta"):
            model = SAM2(architecture(SIZES[size]))
        _check_model(model, want, report.at(case=size))


def _check_model(model: SAM2, want: Entry, report: Report) -> None:
    groups = build_groups(model, MOSE)
    scale = learning_rate(MOSE, step=0, total_steps=100)
    ours = {name: [group["base_lr"] * scale, group["weight_decay"]] for group in groups for name in group["names"]}
    report.compare("lr_wd", ours, want["lr_wd"], RATE)
    report.equal("n_groups", len(groups), want["n_groups"])
    keys = [f"{name} {tuple(value.shape)}" for name, value in to_official(model.state_dict()).items()]
    report.equal("keys", keys, list(want["keys"]))
    report.equal("n_params", sum(parameter.numel() for parameter in model.parameters()), want["n_params"])
