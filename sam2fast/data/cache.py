"""Arrays that take long to compute from files, kept as .npz files until those change.

They lie beside the file that they describe, or in the user's cache folder where that folder cannot be written (a
dataset that many share). Whatever is wrong with a stored file, it is computed again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

_STAMP = "stamp"

Arrays = Mapping[str, np.ndarray]


def cached(source: Path, kind: str, build: Callable[[], Arrays]) -> Arrays:
    """What `build` computes from the file `source`, or computed when that had the size and time that it has now.

    Args:
        kind: what is computed; part of the file's name, `SOURCE.kind.npz`.
    """
    try:
        places, stamp = places_beside(source, kind), stamp_of([source])
    except OSError:
        return build()  # which says what is wrong with the file
    arrays = load(places, stamp)
    if arrays is None:
        arrays = build()
        if store(places, stamp, arrays) is None:
            warnings.warn(
                f"what was read from {source} cannot be kept in {places[0].parent} or {places[1].parent}, so every "
                "process reads it again at every start; let one of these folders be written, or set XDG_CACHE_HOME",
                stacklevel=2,
            )
    return arrays


def places_beside(source: Path, kind: str) -> list[Path]:
    """Where arrays about `source` may lie, in the order of preference."""
    path = source.absolute()
    digest = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    return [path.with_name(f"{path.name}.{kind}.npz"), user_cache() / f"{path.name}.{digest}.{kind}.npz"]


def user_cache() -> Path:
    """Folder for what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sam2fast"


def stamp_of(paths: Iterable[Path]) -> np.ndarray:
    """Sizes and times of files, int64 [2 * files]."""
    states = [path.stat() for path in paths]
    return np.array([number for state in states for number in (state.st_size, state.st_mtime_ns)], np.int64)


def load(places: Sequence[Path], stamp: np.ndarray) -> Arrays | None:
    """Arrays that `store` kept under this stamp; None where there are none."""
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as stored:
                if np.array_equal(stored[_STAMP], stamp):
                    return {name: stored[name] for name in stored.files if name != _STAMP}
        except Exception:  # none, written by something else, or damaged: zipfile and numpy raise all kinds of errors
            continue
    return None


def store(places: Sequence[Path], stamp: np.ndarray, arrays: Arrays) -> Path | None:
    """Write arrays, whole or not at all, to the first of `places` that can be written; None where none can."""
    for place in places:
        partial = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}.", delete=False) as file:
                partial = Path(file.name)
                np.savez(file, **{_STAMP: stamp}, **arrays)
            partial.chmod(0o644)  # temporary files are for their owner alone
            return partial.replace(place)
        except OSError:
            if partial is not None:
                partial.unlink(missing_ok=True)
    return None
