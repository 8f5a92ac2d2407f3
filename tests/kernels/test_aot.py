"""Triton kernels compiled for A100 and H100 without a GPU: no spills, and no work done twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sam2fast_kernels.aot import SHARED_MEMORY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# Capability, dtype of the logits, factor, gamma, packed targets; 64 x 3 masks of 1024 x 1024 pixels.
LOSSES = [
    (80, "float32", 1, 2.0, False),
    (80, "float32", 2, 2.0, False),
    (80, "float32", 4, 2.0, False),
    (80, "bfloat16", 4, 1.5, True),
    (80, "float32", 8, 0.0, False),
    (90, "float32", 4, 2.0, False),
    (90, "bfloat16", 4, 1.5, True),
]
# Capability, dtype of logits and result, activation (see `upsample.op.ACTIVATIONS`); factor 4.
UPSAMPLES = [(80, "float32", 0), (80, "bfloat16", 1), (90, "float32", 1)]

PROGRAM = """
import json, re, sys
import torch
from sam2fast_kernels.aot import compile_launch
from sam2fast_kernels.mask_loss import triton as mask_loss
from sam2fast_kernels.upsample import triton as upsample

def report(launch, capability):
    compiled = compile_launch(launch, capability)
    lanes = launch.arguments["LANES"] // compiled.threads
    rows = launch.arguments["UNROLL_ROWS"]
    print(json.dumps(compiled._asdict() | {
        "resident": compiled.resident_threads(capability), "sass": "",
        "pixels": launch.arguments["FACTOR"] * rows * max(1, lanes),
        "vectors": len(re.findall(r"(?:LDG|STG)[.\\w]*[.](?:64|128) ", compiled.sass)),
    }), flush=True)

losses, upsamples = json.loads(sys.argv[1])
for capability, dtype, factor, gamma, packed in losses:
    logits = torch.empty(64, 3, 1024 // factor, 1024 // factor, dtype=getattr(torch, dtype), device="meta")
    targets = torch.empty(64, 1024, 128 if packed else 1024, dtype=torch.uint8, device="meta")
    report(mask_loss.sums_launch(logits, targets, packed, gamma, 0.25), capability)
    slopes = torch.empty(64, 3, 3, device="meta")
    report(mask_loss.gradient_launch(slopes, logits, targets, packed, gamma, 0.25), capability)
for capability, dtype, activation in upsamples:
    logits = torch.empty(64, 1, 256, 256, dtype=getattr(torch, dtype), device="meta")
    report(upsample.upsample_launch(logits, 4, activation, 20.0, -10.0, logits.dtype), capability)
    grad = torch.empty(64, 1, 1024, 1024, dtype=logits.dtype, device="meta")
    report(upsample.gradient_launch(grad, logits, 4, activation, 20.0), capability)
"""


@pytest.fixture(scope="module")
def compiled():
    """By (variant, direction). In a process of its own, since this one may interpret Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps([LOSSES, UPSAMPLES])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = [(variant, direction) for variant in LOSSES + UPSAMPLES for direction in ("forward", "backward")]
    return dict(zip(keys, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", LOSSES + UPSAMPLES)
def test_registers_and_shared_memory_suffice(variant, direction, compiled):
    kernel = compiled[variant, direction]
    assert kernel["stack"] == 0 and kernel["spills"] == 0
    assert kernel["shared"] <= SHARED_MEMORY[variant[0]]
    assert kernel["resident"] >= 512


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", [variant for variant in LOSSES if variant[2] <= 4])
def test_a_pixel_of_the_loss_is_computed_once(variant, direction, compiled):
    """One exponential and one reciprocal for a pixel, and a second exponential for other exponents than 0, 1, 2."""
    loop, pixels = compiled[variant, direction]["loop"], compiled[variant, direction]["pixels"]
    assert loop["MUFU.RCP"] == pixels
    assert loop["MUFU.EX2"] == pixels * (2 if variant[3] == 1.5 else 1)
    assert sum(loop.values()) <= 60 * pixels
    # Lanes exchange what they owe each other, once for a row of samples; else no thread waits for another.
    assert loop.get("BAR", 0) <= (4 if direction == "backward" else 0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", UPSAMPLES)
def test_pixels_are_moved_in_vectors(variant, direction, compiled):
    kernel = compiled[variant, direction]
    assert kernel["vectors"] == 4
    assert sum(kernel["loop"].values()) <= 28 * kernel["pixels"]


CLICKS = """
import itertools, torch
from sam2fast_kernels.aot import SHARED_MEMORY, compile_launch
from sam2fast_kernels.click_sampling import triton as kernels

for capability, (factor, packed) in itertools.product((80, 90), ((3, True), (4, False))):
    logits = torch.empty(64, 256, 256, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(64, 256 * factor, 32 * factor * (1 if packed else 8), dtype=torch.uint8, device="meta")
    uniform = torch.empty(64, dtype=torch.float64, device="meta")
    launches = kernels.uniform_launches(logits, targets, packed, uniform)
    for launch in (*launches, *kernels.center_launches(logits, targets, packed)):
        compiled = compile_launch(launch, capability)
        name = launch.kernel.__name__
        assert compiled.spills == compiled.stack == 0, (name, capability, factor, packed)
        assert compiled.shared <= SHARED_MEMORY[capability], (name, capability, compiled.shared)
        assert compiled.resident_threads(capability) >= 512, (name, capability, compiled.registers)
        print(name)
"""


def test_clicks_compile_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CLICKS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 16
