"""Sizes and constants of SAM 2 and SAM 2.1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Size = Literal["micro", "tiny", "small", "base_plus", "large"]
Version = Literal["2.0", "2.1"]


@dataclass(frozen=True)
class Architecture:
    """Everything that determines the parameters of a SAM 2 model and what it computes.

    Widths of the trunk double at each stage; strides of its four stages are 4, 8, 16 and 32.
    """

    size: str
    version: str
    image_size: int
    # Hiera trunk (arXiv 2306.00989, as used in SAM 2, arXiv 2408.00714, table 12)
    embed_dim: int
    num_heads: int
    stages: tuple[int, int, int, int]
    global_attention_blocks: tuple[int, ...]
    window_sizes: tuple[int, int, int, int]
    position_size: tuple[int, int]
    """Grid of the learned global position embedding."""
    drop_path: float
    # memory
    memory_dropout: float
    no_object_embed_spatial: bool
    """2.1: memories of frames without the object carry a learned embedding."""
    pointer_time_encoding: bool
    """2.1: object pointers carry their signed, projected distance in time."""
    num_memories: int = 7
    """Frames in the memory bank: the conditioning frame and the previous six."""
    max_pointers: int = 16
    hidden_dim: int = 256
    memory_dim: int = 64
    memory_layers: int = 4
    mask_scale: float = 20.0
    mask_bias: float = -10.0
    """The memory encoder sees sigmoid(logits) * mask_scale + mask_bias."""
    multimask_tracking: bool = True
    """Frames that are tracked without a prompt predict three candidate masks, else one."""
    max_conditioning_frames: int | None = None
    """Most conditioning frames attended to (the closest in time); None is no limit."""

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Output channels of the four trunk stages, fine to coarse."""
        return tuple(self.embed_dim * 2**i for i in range(4))


_TRUNKS: dict[str, dict[str, Any]] = {
    "micro": {"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 3, 1), "global_attention_blocks": (4,)},
    "tiny": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 7, 2), "global_attention_blocks": (5, 7, 9)},
    "small": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 11, 2), "global_attention_blocks": (7, 10, 13)},
    "base_plus": {
        "embed_dim": 112,
        "num_heads": 2,
        "stages": (2, 3, 16, 3),
        "global_attention_blocks": (12, 16, 20),
        "position_size": (14, 14),
    },
    "large": {
        "embed_dim": 144,
        "num_heads": 2,
        "stages": (2, 6, 36, 4),
        "global_attention_blocks": (23, 33, 43),
        "window_sizes": (8, 4, 16, 8),
    },
}
SIZES: tuple[str, ...] = tuple(_TRUNKS)


def architecture(
    size: Size,
    version: Version = "2.1",
    image_size: int = 1024,
    drop_path: float = 0.1,
    memory_dropout: float = 0.1,
    **overrides,
) -> Architecture:
    """Architecture of a named size; `overrides` replace single fields.

    Raises:
        ValueError: unknown size or version, or an image size that is no multiple of 32.
    """
    if size not in _TRUNKS:
        raise ValueError(f"unknown model size {size!r}; choose one of {', '.join(SIZES)}")
    if version not in ("2.0", "2.1"):
        raise ValueError(f"unknown SAM 2 version {version!r}; choose 2.0 or 2.1")
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image size must be a positive multiple of 32, got {image_size}")
    trunk = {"window_sizes": (8, 4, 14, 7), "position_size": (7, 7)} | _TRUNKS[size]
    base = Architecture(
        size=size,
        version=version,
        image_size=image_size,
        drop_path=drop_path,
        memory_dropout=memory_dropout,
        no_object_embed_spatial=version == "2.1",
        pointer_time_encoding=version == "2.1",
        **trunk,
    )
    return replace(base, **overrides)
