"""Weights for others: from an official file, or from a checkpoint of a run, to the layout they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import read_snapshot
from .checkpoint_files import saving, write_folder
from .config import ConfigError
from .models.architecture import SIZES, Architecture, architecture
from .models.huggingface import save_huggingface
from .models.official import check_state, describe, read_state, save_checkpoint, split_checkpoint, to_official
from .models.sam2 import SAM2


def export(
    source: Path,
    layout: str,
    folder: Path,
    image_size: int | None = None,
    multimask_tracking: bool | None = None,
    raw: bool = False,
) -> str:
    """Write the weights of `source` into `folder`, whole or not at all.

    Args:
        source: official checkpoint, or the folder of a checkpoint of a run (RUN/checkpoints/step_XXXXXXXX).
        layout: `official` writes model.pt, encoder.pt, decoder.pt and memory.pt; `huggingface` what
            `Sam2VideoModel.from_pretrained` reads.
        image_size: side of the input that a Hugging Face configuration names; that of the run, or 1024, if None.
        multimask_tracking: `model.multimask_tracking` there; as the run has it, or true, if None.
        raw: the weights of a checkpoint that also holds their averages (`optim.ema`), which are written otherwise:
            its scores are those of the averages.

    Returns:
        What was written: the weights, or their averages.

    Raises:
        UserError: `source` cannot be read or is no whole SAM 2, `image_size` cannot be, or `folder` exists or cannot
            be written.
    """
    if image_size is not None and (image_size < 32 or image_size % 32):
        raise ConfigError(f"--image-size must be a positive multiple of 32, not {image_size}")
    if folder.exists():
        raise ConfigError(f"{folder} exists; give --out a new folder")
    settings, averaged = {"image_size": 1024, "multimask_tracking": True}, False
    if source.is_dir():
        snapshot = read_snapshot(source, raw)
        state, averaged = to_official(snapshot.weights), snapshot.averaged
        settings = {name: snapshot.config["model"][name] for name in settings}
    else:
        state = read_state(source)
    given = {"image_size": image_size, "multimask_tracking": multimask_tracking}
    settings |= {name: value for name, value in given.items() if value is not None}
    arch = _architecture(state, source, settings)
    with torch.device("meta"):
        check_state(state, to_official(SAM2(arch).state_dict()), arch, source)

    def write(path: Path) -> None:
        if layout == "official":
            save_checkpoint(state, path / "model.pt")
            split_checkpoint(state, path)
        else:
            save_huggingface(state, arch, path)

    with saving("the weights", folder):
        write_folder(folder, write)
    return "averages of the weights (optim.ema)" if averaged else "weights"


def _architecture(state: dict[str, Tensor], source: Path, settings: dict[str, Any]) -> Architecture:
    found = describe(state)
    for size in SIZES:
        for version in ("2.0", "2.1"):
            if found == f"SAM {version} {size}":
                return architecture(size, version, **settings)
    raise ConfigError(f"{source} holds {found or 'no SAM 2 model'}, not one of the sizes {', '.join(SIZES)}")
