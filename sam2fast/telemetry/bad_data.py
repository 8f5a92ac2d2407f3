"""The list of videos and images that a run could not use, as a file of its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

BAD_DATA_NAME = "bad_data.jsonl"


class Entry(Protocol):
    """A video or image and why it cannot be used."""

    dataset: str
    name: str
    reason: str


@dataclass(frozen=True)
class Listed:
    """An `Entry` as the file holds it."""

    dataset: str
    name: str
    reason: str


class BadDataLog:
    """Appends entries, each of them once, one JSON object a line. A resumed run adds to the list.

    Every rank writes what it meets, at once: a run may end at any moment.

    Args:
        run_dir: folder of the run; the file is `bad_data.jsonl` in it.
        first: this is the first rank, which begins the list.
        resuming: false starts the list anew.
    """

    def __init__(self, run_dir: str | os.PathLike, first: bool = True, resuming: bool = False) -> None:
        self.path = Path(run_dir) / BAD_DATA_NAME
        if first and not resuming:
            self.path.unlink(missing_ok=True)
        elif first and self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:  # a line that a crash cut off
                file.write("\n")
        self._listed = {(entry.dataset, entry.name) for entry in read_bad_data(run_dir)} if resuming else set()

    def write(self, entries: Iterable[Entry]) -> None:
        """Add what this rank has not listed yet. There is no file before the first entry."""
        new = [entry for entry in entries if (entry.dataset, entry.name) not in self._listed]
        if not new:
            return
        lines = [json.dumps(asdict(Listed(entry.dataset, entry.name, entry.reason))) + "\n" for entry in new]
        with self.path.open("ab", buffering=0) as file:
            file.write("".join(lines).encode())  # in one piece: other ranks write too
        self._listed.update((entry.dataset, entry.name) for entry in new)


def read_bad_data(run_dir: str | os.PathLike) -> list[Listed]:
    """What a run lists, once each; nothing without a file. A line cut off by a crash is left out."""
    path = Path(run_dir) / BAD_DATA_NAME
    if not path.is_file():
        return []
    found: dict[tuple[str, str], Listed] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = Listed(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found.setdefault((entry.dataset, entry.name), entry)
    return list(found.values())
