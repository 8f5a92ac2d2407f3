"""Which videos or images of a dataset are used: include, exclude and fraction of its configuration."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from ...config import DatasetConfig
from ..defects import report
from ..sample import DataError


def select(names: Sequence[str], config: DatasetConfig, dataset: str, seed: int) -> np.ndarray:
    """Ascending indices of the `names` to use; `fraction` takes a share of them that depends on `seed` alone.

    Raises:
        DataError: an include pattern that matches nothing, or nothing left; with the nearest names.
    """
    keep = np.arange(len(names))
    if config.include:
        matched = {pattern: _matching(pattern, names) for pattern in config.include}
        for pattern, found in matched.items():
            if not found.any():
                raise DataError(
                    f"dataset {dataset!r}: include pattern {pattern!r} matches none of its {len(names)} "
                    f"names{_nearest(pattern, names)}"
                )
        keep = keep[np.logical_or.reduce(list(matched.values()))]
    if config.exclude:
        dropped = np.logical_or.reduce([_matching(pattern, names) for pattern in config.exclude])
        keep = keep[~dropped[keep]]
        if not len(keep):
            raise DataError(
                f"dataset {dataset!r}: exclude {list(config.exclude)} leaves none of its {len(names)} "
                f"names ({shorten(names)}); exclude less"
            )
    if config.fraction < 1:
        count = max(1, round(config.fraction * len(keep)))
        keep = np.sort(np.random.default_rng(seed).permutation(keep)[:count])
    return keep


def refuse_twins(twins: Mapping[str, str], dataset: str) -> None:
    """Report files of one name in several places, by that name; does nothing where there are none.

    Raises:
        DataError: there are some.
    """
    if twins:
        error = DataError(
            f"dataset {dataset!r}: names must differ between folders, {len(twins)} do not: "
            f"{next(iter(twins.values()))}; rename the files, or make each folder a dataset of its own"
        )
        report(error, "files of the same name in several folders", twins)


def shorten(names: Sequence[str], count: int = 3) -> str:
    """The first names of a list for a message: `a, b, c and 7 more`."""
    shown = ", ".join(map(str, names[:count]))
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def counted(number: int, noun: str) -> str:
    """`1 video`, `2,000 videos`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _matching(pattern: str, names: Sequence[str]) -> np.ndarray:
    match = re.compile(fnmatch.translate(pattern)).match
    return np.fromiter((match(name) is not None for name in names), bool, count=len(names))


def _nearest(pattern: str, names: Sequence[str]) -> str:
    plain = re.sub(r"[*?\[\]]", "", pattern)
    close = difflib.get_close_matches(plain, list(islice(names, 10_000)), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(map(repr, close))}" if close else f"; it has {shorten(names)}"
