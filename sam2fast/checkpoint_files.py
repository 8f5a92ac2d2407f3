"""Folders that are written whole or not at all, lists of their files, and what is wrong with one."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import UserError
from .parallel.engine import is_write_error

_CHUNK = 2**22
_OLD = ".old"


class SaveError(UserError):
    """Something could not be saved."""


@contextmanager
def saving(what: str, path: Path) -> Iterator[None]:
    """An error of the file system while `what` is written to `path` is one that the user can act on.

    Raises:
        SaveError: in its place.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_write_error(error):
            raise
        reason = (error.strerror or error) if isinstance(error, OSError) else "a file could not be written to its end"
        raise SaveError(
            f"cannot save {what} to {path}: {reason}; free space there, raise the quota, or make the folder writable "
            "again. What was saved before is untouched, and the same command continues from it"
        ) from error


def list_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of the files `paths`, by their path in `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "crc32": _checksum(path)} for path in paths
    }


def find_damage(folder: Path, files: dict[str, dict[str, int]]) -> str:
    """What of `folder` is not as `list_files` found it; empty where all is.

    Raises:
        OSError: a file is there and cannot be read.
    """
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes and not {expected['size']}"
        except FileNotFoundError:
            return f"{name} is missing"
    for name, expected in files.items():  # sizes first: they cost nothing
        if _checksum(folder / name) != expected["crc32"]:
            return f"{name} has another checksum than when it was written"
    return ""


def write_folder(final: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder under a temporary name and rename it when it is whole; where that fails, nothing stays of it."""
    partial = partial_folder(final)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        publish(partial, final)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_folder(final: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return final.with_name(f".{final.name}.partial")


def publish(partial: Path, final: Path) -> None:
    """Rename a folder that is whole, durably. An older one of the same name steps aside for that moment; `put_back`
    finds it where a kill came between."""
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    old = final.with_name(f".{final.name}{_OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Give folders in `folder` that `publish` was about to replace their name again, where it did not come to that."""
    for old in folder.glob(f".*{_OLD}"):
        final = old.with_name(old.name[1 : -len(_OLD)])
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
