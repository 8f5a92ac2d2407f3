"""Weights for others: from an official file, or from a checkpoint of a run, to the layout they read."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .checkpoint import has_averages, read_weights
from .checkpoint_files import saving, write_folder
from .config import ConfigError
from .models.architecture import SIZES, Architecture, architecture
from .models.huggingface import save_huggingface
from .models.official import describe, read_state, save_checkpoint, split_checkpoint, to_official


def export(source: Path, layout: str, folder: Path, image_size: int, raw: bool = False) -> str:
    """Write the weights of `source` into `folder`, whole or not at all.

    Args:
        source: official checkpoint, or the folder of a checkpoint of a run (RUN/checkpoints/step_XXXXXXXX).
        layout: `official` writes model.pt, encoder.pt, decoder.pt and memory.pt; `huggingface` what
            `Sam2VideoModel.from_pretrained` reads.
        image_size: side of the input that a Hugging Face configuration names.
        raw: the weights of a checkpoint that also holds their averages (`optim.ema`), which are written otherwise:
            its scores are those of the averages.

    Returns:
        What was written: the weights, or their averages.

    Raises:
        UserError: `source` cannot be read or is no SAM 2, or `folder` exists or cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; give --out a new folder")
    averaged = source.is_dir() and not raw and has_averages(source)
    state = to_official(read_weights(source, averaged)) if source.is_dir() else read_state(source)
    arch = _architecture(state, source, image_size)

    def write(path: Path) -> None:
        if layout == "official":
            save_checkpoint(state, path / "model.pt")
            split_checkpoint(state, path)
        else:
            save_huggingface(state, arch, path)

    with saving("the weights", folder):
        write_folder(folder, write)
    return "averages of the weights (optim.ema)" if averaged else "weights"


def _architecture(state: dict[str, Tensor], source: Path, image_size: int) -> Architecture:
    found = describe(state)
    for size in SIZES:
        for version in ("2.0", "2.1"):
            if found == f"SAM {version} {size}":
                return architecture(size, version, image_size)
    raise ConfigError(f"{source} holds {found or 'no SAM 2 model'}, not one of the sizes {', '.join(SIZES)}")
