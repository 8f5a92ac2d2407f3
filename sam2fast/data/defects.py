"""Defects of data: reading stops at the first one, `sam2fast check-data` wants all of them.

A reader marks the places where it can go on without a part: `with tolerated(): ...` around the reading of that part, or
`report(error, parts)` where several are missing. Inside `collecting()` these note the defects; elsewhere they raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from .sample import DataError, SizeMismatch

SIZES = "sizes that differ"
"""The kind of every `SizeMismatch`."""


@dataclass(frozen=True)
class Defect:
    """One defect of a dataset."""

    item: str
    """The video or image, as `exclude` would name it; empty where it belongs to none."""
    kind: str
    """What could not be read or does not fit; defects are grouped by it."""
    reason: str
    """Names the file, what is wrong with it and the remedy."""
    is_warning: bool = False
    """The data can be trained on, but perhaps not as meant."""
    count: int = 1
    """More than 1 where this one stands for several of its kind in its item."""


@dataclass
class Collected:
    """Defects noted inside `collecting()`; who collects says of which `item` and `kind` they are."""

    item: str = ""
    kind: str = ""
    defects: list[Defect] = field(default_factory=list)

    def error(self, error: DataError) -> None:
        kind = SIZES if isinstance(error, SizeMismatch) else self.kind
        self._add(Defect(self.item, kind, str(error)))

    def warning(self, kind: str, reason: str) -> None:
        self._add(Defect(self.item, kind, reason, is_warning=True))

    def _add(self, defect: Defect) -> None:
        # a file that several steps need fails in each
        if all(defect.reason != known.reason for known in self.defects):
            self.defects.append(defect)


_collected: Collected | None = None


@contextmanager
def collecting() -> Iterator[Collected]:
    """Inside the block, readers note defects and go on without what is defective. Holds for this process."""
    global _collected
    outer, _collected = _collected, Collected()
    try:
        yield _collected
    finally:
        _collected = outer


def is_collecting() -> bool:
    return _collected is not None


def note_warning(kind: str, parts: Mapping[str, str] | str) -> bool:
    """Note warnings (by item, or one of the item at hand) while collecting; whether that is so."""
    if _collected is None:
        return False
    if isinstance(parts, str):
        _collected.warning(kind, parts)
    else:
        _collected.defects += [Defect(item, kind, reason, is_warning=True) for item, reason in parts.items()]
    return True


def report(error: DataError, kind: str, parts: Mapping[str, str]) -> None:
    """Raise `error`, which sums defects up; while collecting, note its parts instead: item -> reason."""
    if _collected is None:
        raise error
    _collected.defects += [Defect(item, kind, reason) for item, reason in parts.items()]


class tolerated:
    """Context that a `DataError` ends and does not leave while collecting: it is noted. Elsewhere it does nothing, and
    is a class because that costs less: it stands around each of the hundreds of masks of an image."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if _collected is None or not isinstance(error, DataError):
            return False
        _collected.error(error)
        return True
