"""Versions of the packages that decide what a run computes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import __version__


def versions() -> dict[str, str | None]:
    """Of sam2fast, torch and deepspeed; None where a package is not installed."""
    return {"sam2fast": __version__, "torch": _version("torch"), "deepspeed": _version("deepspeed")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
