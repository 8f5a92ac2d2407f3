"""state.json of a checkpoint or a finished stage: what it says, and whether files beside it are as it lists them."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checkpoint_files import find_damage, list_files
from .run_state import EntryState, ResumeError, RunState

FORMAT = 2
"""Of the folders of checkpoints; 1 held files of each engine's own."""


def save_state(folder: Path, state: RunState) -> None:
    """Write `state` beside the weights of a finished stage, and a list of these."""
    write_header(folder, {"state": asdict(state), "files": list_files(folder, folder.glob("*.pt"))})


def load_stage(folder: Path) -> RunState:
    """Read what `save_state` wrote.

    Raises:
        ResumeError: it or the weights beside it are damaged, or of another version.
    """
    if damage := find_fault(folder, listed=False):
        raise ResumeError(
            f"the weights of a finished stage, {folder}, are damaged ({damage}); restore the folder from a copy, or "
            "delete it to train the stage again from its last checkpoint"
        )
    return load_state(folder)


def load_state(folder: Path) -> RunState:
    """The state of a run in state.json.

    Raises:
        ResumeError: the file is damaged, or of another version.
    """
    values = read_header(folder).get("state")
    try:
        return RunState(**values | {"entries": [EntryState(**entry) for entry in values["entries"]]})
    except (TypeError, KeyError, AttributeError):
        raise other_version(folder) from None


def write_header(path: Path, values: dict[str, Any]) -> None:
    """Write state.json, with a checksum of all it says."""
    values = json.loads(json.dumps(values))  # as they will be read: a key that is a number becomes text
    (path / "state.json").write_text(json.dumps({"crc32": _checksum(values)} | values, indent=1))


def read_header(path: Path) -> dict[str, Any]:
    """What `write_header` was given. Files of earlier versions have no checksum.

    Raises:
        ResumeError: it is missing or damaged, or cannot be read at present.
    """
    try:
        header = json.loads((path / "state.json").read_text())
        if not isinstance(header, dict):
            raise ValueError("it holds no settings")
        expected = header.pop("crc32", None)
        if expected is not None and _checksum(header) != expected:
            raise ValueError("its text is not that which was written")
        return header
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _checksum(values: dict[str, Any]) -> int:
    """CRC-32 of what JSON says, however it is laid out."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def other_version(path: Path) -> ResumeError:
    return ResumeError(
        f"{path} was written by another version of sam2fast, which saved other files or noted the position in the data "
        "otherwise; finish the run with that version, or start a new output_dir with model.checkpoint set to the "
        "weights of the last finished stage"
    )


def unreadable(path: Path, error: Exception) -> ResumeError:
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError):
        return ResumeError(
            f"{path} cannot be read at present ({error.strerror or error}); it may be whole, so training does not go "
            "on without it: start again when its file system answers and its files may be read"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResumeError(
        f"{path} cannot be read ({reason}); delete this folder to continue from what was saved before it"
    )


def find_fault(path: Path, listed: bool = True) -> str:
    """What is wrong with the files of a checkpoint; empty where nothing is, or where it is of another version.

    Args:
        listed: files must be listed; those of finished stages were not always.

    Raises:
        ResumeError: the file system does not let them be read, which says nothing about them.
    """
    try:
        header = read_header(path)
        if listed and header.get("format") != FORMAT:
            return ""
        return find_damage(path, header["files"] if listed else header.get("files", {}))
    except OSError as error:
        raise unreadable(path, error) from error
    except ResumeError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | NotADirectoryError):
            return "state.json is missing"
        if isinstance(cause, OSError):
            raise
        return f"state.json cannot be read: {cause}"
    except (TypeError, KeyError, AttributeError):
        return "state.json does not list its files as it should"
