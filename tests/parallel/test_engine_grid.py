"""SAM 2 on several ranks gives the losses and weights of one process, with every engine and number of micro-steps."""

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


def compare(cases: list[dict], folder: Path, ranks: int = 2) -> dict[str, dict[str, float]]:
    """Relative differences of losses (the largest) and weights (all together) from one process with one micro-step."""
    reference, out = str(folder / "reference.pt"), folder / "found.json"
    whole = [cases[0] | {"engine": {"kind": "torch"}, "accumulate": 1, "compile": None}]
    for number, given in ((1, whole), (ranks, cases)):
        arguments = [str(WORKER), json.dumps(given), str(out), reference]
        done = Launch(arguments, number, folder, environment()).wait(3000)
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def check(found: dict[str, dict[str, float]], cases: list[dict]) -> None:
    assert set(found) == {case["name"] for case in cases}
    print(found)
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
def test_gradients_reduced_in_bfloat16(tmp_path: Path) -> None:
    """Near float32, and further from it than float32 is from itself on one rank."""
    common = {"accumulate": 2, "steps": 2}
    cases = [{"name": "float32", "engine": ENGINES["torch"]} | common]
    for name in ("torch", "fsdp", "ZeRO 2"):
        cases.append({"name": name, "engine": ENGINES[name] | {"reduce_dtype": "bfloat16"}} | common)
    weights = {name: differences["weights"] for name, differences in compare(cases, tmp_path).items()}
    rounding = weights.pop("float32")
    assert all(2 * rounding < difference <= TOLERANCE for difference in weights.values()), (rounding, weights)


@pytest.mark.exhaustive
def test_compiled_regions_with_every_engine(tmp_path: Path) -> None:
    cases = [
        {"name": name, "engine": engine, "accumulate": 1, "steps": 3, "compile": "aot_eager"}
        for name, engine in ENGINES.items()
        if name not in ("hybrid, groups of 2", "ZeRO 0", "ZeRO 3")  # ZeRO 3 refuses to be compiled
    ]
    check(compare(cases, tmp_path), cases)


@pytest.mark.exhaustive
def test_shards_on_two_ranks_and_copies_on_two_more(tmp_path: Path) -> None:
    cases = [
        {"name": name, "engine": ENGINES[name], "accumulate": accumulate, "steps": 3}
        for name in ("torch", "hybrid, groups of 2")
        for accumulate in (1, 2)
    ]
    check(compare(cases, tmp_path, ranks=4), cases)


@pytest.mark.exhaustive
def test_twenty_steps_with_every_engine(tmp_path: Path) -> None:
    cases = [
        {"name": f"{name}, {accumulate} micro-steps", "engine": engine, "accumulate": accumulate, "steps": 20}
        for name, engine in ENGINES.items()
        for accumulate in (1, 2, 4)
    ]
    check(compare(cases, tmp_path), cases)
