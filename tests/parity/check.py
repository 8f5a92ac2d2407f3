"""Compare sam2fast with recorded values of the official SAM 2 trainer: `python tests/parity/check.py FILE`.

Prints one row for each comparison. Exit status: 0 all errors are within ten times the noise floor, 1 some are not,
2 the file is missing or has another structure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))
if importlib.util.find_spec("sam2fast") is None:
    # A bare checkout. Not otherwise: the folder kernels/ in it would hide the package `kernels` from others.
    sys.path.insert(0, str(HERE.parents[1]))

from sections import HEADER, Entry, OracleError, Report, wrap  # noqa: E402

SECTIONS = {
    "groups": ("groups",),
    "parts": ("parts", "prompts", "sampling"),
    "loss": ("loss",),
    "step": ("step",),
}
"""Sections of a file and the modules that check them."""


def load(path: str | Path) -> Entry:
    """Read a parity file.

    Raises:
        OracleError: the file cannot be read, or holds none of the known sections, or others than those.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OracleError("no such file") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OracleError(f"not a file of torch.save with plain values and tensors ({type(error).__name__})") from None
    if not isinstance(content, dict) or not set(content) & set(SECTIONS):
        raise OracleError(f"expected a mapping with some of the sections {', '.join(SECTIONS)}")
    unknown = set(content) - {*SECTIONS, "meta"}
    if unknown:
        raise OracleError(f"unknown section {sorted(map(str, unknown))[0]!r}; known: {', '.join(SECTIONS)}")
    return wrap(content)


def check(content: Entry) -> Report:
    """Compute and compare all sections that the file has.

    Raises:
        OracleError: something is missing, or is not known and would go unchecked.
    """
    report = Report()
    for name, modules in SECTIONS.items():
        if name not in content:
            continue
        checks = [importlib.import_module(f"sections.{module}") for module in modules]
        if name == "parts":
            unknown = set(content[name]).difference(*(module.CASES for module in checks))
            if unknown:
                raise OracleError(f"parts: unknown entry {sorted(map(str, unknown))[0]!r}")
        for module in checks:
            module.check(content[name], report.at(section=name))
    if not report.rows:
        raise OracleError("its sections hold nothing to compare")
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="parity file, for example tests/parity/oracle.pt")
    path = parser.parse_args(arguments).file
    try:
        report = check(load(path))
    except OracleError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        print(f"{path}: not the structure of a parity file ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    print(HEADER, *report.rows, sep="\n")
    failed = len(report.failures)
    print(f"{len(report.rows) - failed} of {len(report.rows)} comparisons within ten times the noise floor")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
