"""Records that cannot be used: skipped, counted, and a reason to stop where they are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from .sample import DataError


@dataclass(frozen=True)
class BadRecord:
    """A video or image that training met and could not use."""

    dataset: str
    name: str
    reason: str
    """Text of its `DataError`: the file, what is wrong with it and the remedy."""


class BadRecords:
    """Bad records that a run has met since it was started; a record counts once, however often it comes.

    Args:
        sizes: records of each dataset.
        max_share: see `config.DataConfig.max_bad_share`.
    """

    def __init__(self, sizes: Mapping[str, int], max_share: float):
        self._sizes, self._max_share = sizes, max_share
        self._counts: Counter[str] = Counter()
        self._known: set[tuple[str, str]] = set()
        self._new: list[BadRecord] = []

    def __len__(self) -> int:
        return len(self._known)

    def limit(self, dataset: str) -> int:
        """How many records of a dataset may be bad."""
        return int(self._max_share * self._sizes.get(dataset, 0) + 1e-6)

    def add(self, records: Iterable[BadRecord]) -> None:
        """Count records.

        Raises:
            DataError: a dataset has too many.
        """
        for record in records:
            if (record.dataset, record.name) not in self._known:
                self._known.add((record.dataset, record.name))
                self._counts[record.dataset] += 1
                self._new.append(record)
            self._check(record)

    def take_new(self) -> list[BadRecord]:
        """Records added since the last call."""
        new, self._new = self._new, []
        return new

    def _check(self, last: BadRecord) -> None:
        count, limit = self._counts[last.dataset], self.limit(last.dataset)
        if count > limit > 0:
            raise DataError(
                f"{count} of the {self._sizes[last.dataset]} videos or images of dataset {last.dataset!r} cannot be "
                f"used, more than data.max_bad_share={self._max_share:g} allows; the last one: {last.reason}"
            )
        if count > limit:
            size = self._sizes.get(last.dataset)
            allowed = f" (data.max_bad_share={self._max_share:g} allows none of {size} to be unusable)" if size else ""
            raise DataError(last.reason + allowed)


class RecordGuard:
    """Lets a loader skip records: `with guard.using(name)` swallows a `DataError` and notes it.

    Args:
        limit: records that may be bad; the error of one more is raised.
    """

    def __init__(self, dataset: str, limit: int):
        self._dataset, self._limit = dataset, limit
        self._known: set[str] = set()
        self._new: list[BadRecord] = []
        self.reasons: list[str] = []
        """Texts of the errors that were swallowed; for the user to empty."""

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            self.reasons.append(str(error))
            if name not in self._known:
                self._known.add(name)
                self._new.append(BadRecord(self._dataset, name, str(error)))
            if len(self._known) > self._limit:
                raise

    def take_new(self) -> list[BadRecord]:
        """Records noted for the first time since the last call."""
        new, self._new = self._new, []
        return new
