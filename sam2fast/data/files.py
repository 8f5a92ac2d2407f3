"""Reading files and decoding images: every failure is one `DataError` that names the file.

Bytes come first and decoding second, because SA-1B images are read out of tar files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from .defects import note_warning
from .sample import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_DAMAGED = "restore it from the source, or name it in the dataset's `exclude`"


def read_bytes(path: str | os.PathLike, offset: int = 0, size: int = -1) -> bytes:
    """Read a file, or `size` bytes of it from `offset`.

    Raises:
        DataError: the file is missing, unreadable, empty or ends early.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None
    if not data or len(data) < size:
        wanted = f" of {size}" if size > 0 else ""
        raise DataError(f"{path} holds {len(data)} bytes{wanted}: it is empty or was cut off; {_DAMAGED}")
    return data


def parse_json(data: bytes, source: str | os.PathLike) -> Any:
    """Parse the JSON text of a file called `source`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not valid JSON ({error}); {_DAMAGED}") from None


def decode_image(data: bytes, source: str | os.PathLike) -> np.ndarray:
    """Decode a JPEG or PNG to uint8 [H, W, 3] RGB as stored: masks are drawn on that, so EXIF rotation is ignored."""
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = None if _is_cut_off(data) else cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # of a header that states an impossible size
        raise DataError(f"cannot decode {source}: {_one_line(error)}; {_DAMAGED}") from None
    if image is None:
        raise DataError(f"cannot decode {source}: not an image or cut off after {len(data)} bytes; {_DAMAGED}")
    return image


def check_image(data: bytes, source: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an image that somebody else will decode, once its header is sound and its end is there."""
    if _is_cut_off(data):
        raise DataError(f"cannot decode {source}: cut off after {len(data)} bytes; {_DAMAGED}")
    return image_size(data, source)


def image_size(data: bytes, source: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an image as stored, from its header alone."""
    from PIL import Image

    try:
        width, height = Image.open(io.BytesIO(data)).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the header of {source}: {_one_line(error)}; {_DAMAGED}") from None
    return height, width


def decode_labels(data: bytes, source: str | os.PathLike, void: bool = True) -> np.ndarray:
    """Decode a mask PNG to object numbers, uint8 [H, W], 0 where there is none.

    Palette images give their indices (a color decoder would lose them), gray images their values; a gray image of
    nothing but 0 and 255 is a single object, number 1. In all others 255 marks void pixels, which belong to no object;
    without `void` it is a number like others.
    """
    from PIL import Image

    try:
        if _is_cut_off(data):
            raise OSError(f"cut off after {len(data)} bytes")
        image = Image.open(io.BytesIO(data))
        mode, labels = image.mode, np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode mask {source}: {_one_line(error)}; {_DAMAGED}") from None
    if mode in ("RGB", "RGBA") and (labels[..., :1] == labels[..., 1:3]).all():
        mode, labels = "L", labels[..., 0]
    if mode == "1":
        return labels.astype(np.uint8)
    if mode not in ("P", "L"):
        raise DataError(
            f"mask {source} has image mode {mode}; save masks as palette or 8-bit gray PNG whose pixel "
            "values are object numbers"
        )
    full = labels == 255
    if void and full.any():
        single = mode == "L" and not (labels[~full]).any()
        labels = np.where(full, np.uint8(single), labels)
    return labels


def list_files(folder: Path, suffixes: tuple[str, ...]) -> Iterable[tuple[Path, list[str]]]:
    """Folders below `folder` (itself included) that hold files with one of `suffixes`, each with its sorted names."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        found = sorted(name for name in names if name.lower().endswith(suffixes) and not name.startswith("."))
        if found:
            yield Path(parent), found


def digest(data: bytes | np.ndarray) -> str:
    """Of names, 16 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def digest_of_names(rows: Iterable[bytes]) -> str:
    """Of rows whose fields are separated by zero bytes, the name first."""
    return digest(b"\0".join(row.partition(b"\0")[0] for row in rows))


class Packed:
    """Read-only sequence of byte strings in two tensors.

    Millions of Python objects would be pickled to, or copied in, every worker process; tensors are shared instead.
    """

    def __init__(self, items: Iterable[bytes]):
        parts = list(items)
        self._ends = torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)
        self._data = torch.from_numpy(np.frombuffer(bytearray(b"".join(parts)), np.uint8))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return self._data[start : int(self._ends[index])].numpy().tobytes()


class WarnOnce:
    """A warning that is given once, whichever worker process of the loader meets its cause first."""

    def __init__(self) -> None:
        self._given = torch.zeros((), dtype=torch.bool).share_memory_()

    def __call__(self, message: str) -> None:
        if not note_warning("masks that are resized", message) and not self._given:
            self._given.fill_(True)
            warnings.warn(message, stacklevel=2)


def _is_cut_off(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end marker (some decoders fill the missing part with gray and say nothing)."""
    if data.startswith(b"\xff\xd8"):  # end of image must follow the last start of scan; a thumbnail has its own pair
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return data.startswith(b"\x89PNG") and b"IEND" not in data[-256:]


def _one_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "not an image" if text.startswith("cannot identify image file") else text
