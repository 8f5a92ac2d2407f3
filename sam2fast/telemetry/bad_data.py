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

    Args:
        run_dir: folder of the run; the file is `bad_data.jsonl` in it.
        enabled: false on all ranks but the first, where nothing is written.
        resuming: false starts the list anew.
    """

    def __init__(self, run_dir: str | os.PathLike, enabled: bool = True, resuming: bool = False) -> None:
        self.path = Path(run_dir) / BAD_DATA_NAME
        self._enabled = enabled
        if enabled and not resuming:
            self.path.unlink(missing_ok=True)
        elif enabled and self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:  # a line that a crash cut off
                file.write("\n")
        self._listed = {(entry.dataset, entry.name) for entry in read_bad_data(run_dir)} if enabled else set()

    def write(self, entries: Iterable[Entry]) -> None:
        """Add what is not listed yet. There is no file before the first entry."""
        new = [entry for entry in entries if (entry.dataset, entry.name) not in self._listed]
        if not self._enabled or not new:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for entry in new:
                file.write(json.dumps(asdict(Listed(entry.dataset, entry.name, entry.reason))) + "\n")
        self._listed.update((entry.dataset, entry.name) for entry in new)


def read_bad_data(run_dir: str | os.PathLike) -> list[Listed]:
    """What a run lists; nothing without a file. A line cut off by a crash is left out."""
    path = Path(run_dir) / BAD_DATA_NAME
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(Listed(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
