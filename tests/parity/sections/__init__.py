"""What the sections of a parity check share: access to the file, noise floors and the table of comparisons.

Each module of this package is named after a section of the file and has `check(data, report)`, which computes our
values and enters one row into the report for every comparison; several modules share the section `parts` and name the
entries they know in CASES. `data["missing"]` raises an `OracleError` that names the path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

TOLERANCE = 10.0
"""Errors up to this many noise floors pass."""


class OracleError(ValueError):
    """A file that does not have the structure of a parity file; the message says where and what is expected."""


class Entry(dict):
    """A mapping of the file that knows where it lies, for messages."""

    path: str = ""

    def __missing__(self, key: Any) -> Any:
        raise OracleError(f"{self.path or 'top level'}: key {key!r} is missing")


def wrap(value: Any, path: str = "") -> Any:
    """The value with all mappings inside turned into `Entry`."""
    if isinstance(value, Mapping):
        entry = Entry((key, wrap(item, f"{path}/{key}" if path else str(key))) for key, item in value.items())
        entry.path = path
        return entry
    if isinstance(value, (list, tuple)):
        return type(value)(wrap(item, f"{path}[{i}]") for i, item in enumerate(value))
    return value


@dataclass(frozen=True)
class Floor:
    """Noise between two correct computations: |ours - reference| is about `absolute + relative * |reference|`."""

    absolute: float = 0.0
    relative: float = 0.0

    def __str__(self) -> str:
        parts = [f"{value:.1e} {name}" for name, value in (("abs", self.absolute), ("rel", self.relative)) if value]
        return " + ".join(parts) or "exact"


@dataclass(frozen=True)
class Row:
    """One comparison of the table."""

    section: str
    case: str
    quantity: str
    absolute: float
    """Largest |ours - reference|."""
    relative: float
    """Largest |ours - reference| / |reference| over elements whose reference is not 0."""
    floors: float
    """Largest error in units of the noise floor."""
    floor: Floor
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.floors <= TOLERANCE  # false for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        return (
            f"{self.section:7} {self.case:14} {self.quantity:28} {self.absolute:9.2e} {self.relative:9.2e} "
            f"{self.floors:9.2e} {verdict:4} {str(self.floor):25} {self.note}"
        ).rstrip()


HEADER = (
    f"{'section':7} {'case':14} {'quantity':28} {'max abs':>9} {'max rel':>9} {'floors':>9} {'':4} "
    f"{'noise floor':25} worst at"
)


@dataclass
class Report:
    """Rows of a check. `at` gives a view that enters rows under another section or case."""

    section: str = ""
    case: str = ""
    rows: list[Row] = field(default_factory=list)

    def at(self, **names: str) -> Report:
        return replace(self, **names)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    def compare(self, quantity: str, ours: Any, reference: Any, floor: Floor) -> None:
        """Enter the worst element of two numbers, two tensors, or two mappings or sequences of them."""
        ours, reference = dict(_leaves(ours)), dict(_leaves(reference))
        if ours.keys() != reference.keys():
            self._differ(quantity, f"in one only: {_some(ours.keys() ^ reference.keys())}", floor)
            return
        for name, expected in reference.items():
            if ours[name].shape != expected.shape:
                self._differ(quantity, f"{name} {tuple(ours[name].shape)} instead of {tuple(expected.shape)}", floor)
                return
        value, expected = (torch.cat([leaves[name].reshape(-1) for name in reference]) for leaves in (ours, reference))
        error, size = (value - expected).abs(), expected.abs()
        error[value == expected] = 0  # also equal infinities
        floors = torch.where(error == 0, error, error / (floor.absolute + floor.relative * size))
        relative = error[size > 0] / size[size > 0]
        largest = [values.max().item() if len(values) else 0.0 for values in (error, relative, floors)]
        note = _leaf_at(int(floors.argmax()), reference) if largest[2] != 0 else ""
        self.rows.append(Row(self.section, self.case, quantity, *largest, floor, note))

    def equal(self, quantity: str, ours: Any, reference: Any) -> None:
        """Enter whether two plain values are equal; sets say what only one of them has."""
        if ours == reference:
            self.rows.append(Row(self.section, self.case, quantity, 0.0, 0.0, 0.0, Floor()))
        elif isinstance(reference, (set, frozenset)):
            self._differ(quantity, f"missing {_some(reference - ours)}, unexpected {_some(ours - reference)}", Floor())
        else:
            self._differ(quantity, f"{ours!r:.120} instead of {reference!r:.120}", Floor())

    def _differ(self, quantity: str, note: str, floor: Floor) -> None:
        worst = float("inf")
        self.rows.append(Row(self.section, self.case, quantity, worst, worst, worst, floor, note))


def _leaves(value: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """The tensors in a tree of mappings and sequences, with their paths; numbers become tensors."""
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [leaf for key, item in items for leaf in _leaves(item, f"{path}/{key}" if path else str(key))]
    return [(path, torch.as_tensor(value, dtype=torch.float64, device="cpu").detach())]


def _leaf_at(index: int, leaves: Mapping[str, torch.Tensor]) -> str:
    """Name of the leaf that holds element `index` of all leaves laid end to end."""
    for name, leaf in leaves.items():
        if index < leaf.numel():
            return name
        index -= leaf.numel()
    raise IndexError(index)


def _some(names: Any, most: int = 3) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
