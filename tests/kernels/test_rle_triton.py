"""The Triton form of the run-length operators: equal to the reference, and compiled for A100 and H100.

On a GPU where there is one, else interpreted; the compilation needs none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from sam2fast_kernels import pack_masks
from sam2fast_kernels.aot import SHARED_MEMORY
from sam2fast_kernels.rle import RunLengths, parse
from sam2fast_kernels.rle.op import rle_decode, rle_resample

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 1), (1, 9), (7, 1), (17, 33)]
PLACES = [
    ((slice(0, 9), slice(0, 25)), (slice(0, 33), slice(0, 33)), 33, False),  # more than one tile
    ((slice(1, 8), slice(3, 24)), (slice(0, 11), slice(0, 11)), 11, True),  # enlarged down, reduced across
    ((slice(0, 9), slice(0, 25)), (slice(3, 12), slice(9, 16)), 19, True),  # with empty borders
    ((slice(8, 9), slice(24, 25)), (slice(0, 1), slice(0, 9)), 9, False),
]


def masks_and_runs(size: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, RunLengths]:
    """Noise, and a full mask; runs as lists, two for each pixel, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, *size, generator=generator) < torch.tensor([0.5, 1.0]).view(2, 1, 1)
    counts = [[run for pixel in mask.t().flatten().tolist() for run in (1 - pixel, +pixel)] for mask in masks]
    return masks.to(DEVICE), parse(counts, size).check().to(DEVICE)


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_those_of_the_runs(size, poison_empty):
    masks, runs = masks_and_runs(size)
    assert torch.equal(runs.decode(backend="triton"), masks)
    assert torch.equal(runs.decode(packed=True, backend="triton"), pack_masks(masks))
    assert torch.equal(runs.select([1, 0]).decode(backend="triton"), masks.flip(0))


@pytest.mark.parametrize("place, packed", zip(PLACES, [True, False, True, False], strict=True))
def test_squares_are_those_of_the_reference(place, packed, poison_empty):
    _, runs = masks_and_runs((9, 25), seed=1)
    expected = runs.resample(*place, backend="reference")
    squares = runs.resample(*place, packed=packed, backend="triton")
    assert torch.equal(squares, pack_masks(expected) if packed else expected)


def test_no_masks_faulty_masks_and_strides():
    assert parse([], (3, 9)).to(DEVICE).decode(backend="triton").shape == (0, 3, 9)
    runs = parse([[27], b"", [0, 27]], (3, 9)).to(DEVICE)
    assert runs.decode(backend="triton").sum((1, 2)).tolist() == [0, 0, 27]
    spread = [tensor.repeat_interleave(2)[::2] for tensor in (runs.ends, runs.starts, runs.lengths)]
    assert torch.equal(rle_decode.overloads["triton"](*spread, 3, 9, False), runs.decode(backend="triton"))
    for bad in ((runs.ends.int(), runs.starts, runs.lengths), (runs.ends, runs.starts, runs.lengths[:1])):
        with pytest.raises(RuntimeError, match="ends must be int64"):
            rle_decode.overloads["triton"](*bad, 3, 9, False)
    with pytest.raises(RuntimeError, match="part of the square"):
        rle_resample.overloads["triton"](*spread, 3, 9, 0, 3, 0, 9, 0, 5, 0, 5, 4, False, False)


@pytest.mark.parametrize("operator, place", [(rle_decode, ()), (rle_resample, (1, 7, 0, 9, 0, 9, 2, 10, 10, True))])
def test_operators_pass_opcheck(operator, place):
    _, runs = masks_and_runs((7, 9))
    arguments = (runs.ends, runs.starts, runs.lengths, 7, 9, *place, True)
    torch.library.opcheck(operator.overloads["triton"], arguments)


@pytest.mark.gpu
def test_a_frame_of_a_thousand_masks():
    _, runs = masks_and_runs((33, 70))
    many = runs.select([0, 1] * 500)
    place = (slice(0, 33), slice(0, 70)), (slice(0, 1024), slice(0, 1024)), 1024
    expected = runs.to("cpu").resample(*place, packed=True).repeat(500, 1, 1)
    assert torch.equal(many.resample(*place, packed=True).cpu(), expected)


PROGRAM = """
import json, sys
import torch
from sam2fast_kernels.aot import compile_launch
from sam2fast_kernels.rle import triton as kernels

ends, starts, lengths = (torch.empty(n, dtype=torch.int64, device="meta") for n in (20000, 64, 64))
for capability in (80, 90):
    for packed in (False, True):
        place = (30, 800, 20, 470, 0, 1024, 0, 1024, 1024, True)
        launches = [kernels.resample_launch(ends, starts, lengths, 848, 480, *place, packed)]
        if packed:
            launches.append(kernels.decode_launch(ends, starts, lengths, 848, 480, packed))
        for launch in launches:
            compiled = compile_launch(launch, capability)
            resident = compiled.resident_threads(capability)
            print(json.dumps(compiled._asdict() | {"sass": "", "capability": capability, "resident": resident}))
"""


def test_registers_and_shared_memory_suffice():
    """In a process of its own, since this one may interpret Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = list(map(json.loads, done.stdout.splitlines()))
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel["stack"] <= 8 and kernel["spills"] == 0  # Triton 3.6 takes 8 bytes for one of them
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]]
        assert kernel["resident"] >= 1024
