"""The cases of run.py as pytest-benchmark entries: `pytest benchmarks/ --benchmark-only -k "mask_loss and 8x3"`.

Groups compare providers of one shape and mode. No test fails for being slow. Peak memory and ratios: run.py.
"""

from __future__ import annotations

import functools

import cases
import pytest
import torch
from harness.case import Case
from harness.memory import free_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5
ENTRIES = [
    (case, shape, mode, provider)
    for case in map(cases.load, cases.NAMES)
    for shape in case.shapes
    for mode in case.modes
    for provider in case.providers
]


@functools.cache
def check(case: Case, provider: str) -> str | None:
    """What is wrong with the results of a provider on a small shape."""
    inputs = case.make_inputs(case.shape(case.check_shape), DEVICE)
    return case.fault(provider, case.observe(case.providers[provider].prepare(), inputs), case.reference(inputs))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: "-".join([entry[0].name, *entry[1:]]))
def test_speed(benchmark, entry):
    case, text, mode, name = entry
    provider, shape = case.providers[name], case.shape(text)
    if obstacle := provider.obstacle(DEVICE):
        pytest.skip(f"{name} {obstacle}")
    if (free := free_bytes(DEVICE)) and provider.full_size_tensors * shape.full_size_bytes > 0.8 * free:
        pytest.skip("does not fit into memory")
    assert check(case, name) is None
    run, inputs = provider.prepare(), case.make_inputs(shape, DEVICE)

    def forward() -> tuple[tuple, dict]:
        outputs = run(inputs) if mode == "bwd" else None
        _wait()
        return (outputs,), {}

    def timed(outputs: dict | None) -> None:
        outputs = run(inputs) if outputs is None else outputs
        if mode != "fwd":
            case.backward(inputs, outputs)
        _wait()

    benchmark.group = f"{case.name} {text} {mode}"
    benchmark.pedantic(timed, setup=forward, rounds=ROUNDS, warmup_rounds=1)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
