"""SAM 2 on two ranks gives the losses and weights of one process, with every engine and any number of micro-steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import Launch, environment

WORKER = Path(__file__).with_name("grid_worker.py")
ENGINES = {
    "torch": {"kind": "torch"},
    "fsdp": {"kind": "fsdp"},
    "hybrid, groups of 1": {"kind": "fsdp", "shard_size": 1},
    "hybrid, groups of 2": {"kind": "fsdp", "shard_size": 2},
    **{f"ZeRO {stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
TOLERANCE = 1e-5


def compare(cases: list[dict], folder: Path) -> dict[str, dict[str, float]]:
    """Relative differences of losses (the largest) and weights (all together) from one process with one micro-step."""
    reference, out = str(folder / "reference.pt"), folder / "found.json"
    whole = [cases[0] | {"engine": {"kind": "torch"}, "accumulate": 1}]
    for ranks, given in ((1, whole), (2, cases)):
        arguments = [str(WORKER), json.dumps(given), str(out), reference]
        done = Launch(arguments, ranks, folder, environment()).wait(3000)
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def check(found: dict[str, dict[str, float]], cases: list[dict]) -> None:
    assert set(found) == {case["name"] for case in cases}
    for name, differences in found.items():
        assert max(differences.values()) <= TOLERANCE, (name, differences)


def test_a_step_of_each_kind(tmp_path: Path) -> None:
    """With frozen blocks, missing gradients left out, and everything recomputed, for which FSDP gathers again."""
    common = {"steps": 3, "freeze": ["image_encoder.trunk.blocks.[0-3].*"], "optim": {"missing_grad": "skip"}}
    cases = [
        {"name": "torch", "engine": ENGINES["torch"], "accumulate": 2},
        {"name": "fsdp", "engine": ENGINES["fsdp"], "accumulate": 1, "recompute": "decoder+trunk+memory"},
        {"name": "hybrid", "engine": ENGINES["hybrid, groups of 1"], "accumulate": 4, "recompute": "none"},
    ]
    cases = [case | common for case in cases]
    check(compare(cases, tmp_path), cases)


@pytest.mark.exhaustive
def test_twenty_steps_with_every_engine(tmp_path: Path) -> None:
    cases = [
        {"name": f"{name}, {accumulate} micro-steps", "engine": engine, "accumulate": accumulate, "steps": 20}
        for name, engine in ENGINES.items()
        for accumulate in (1, 2, 4)
    ]
    check(compare(cases, tmp_path), cases)
