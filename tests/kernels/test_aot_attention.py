"""Memory attention compiled for A100 and H100 without a GPU: tensor cores, no spills, and no work done twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sam2fast_kernels.aot import SHARED_MEMORY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# Capability, width of the values, dropout; bfloat16, 4096 queries of width 256. Values that are 64 wide are memories,
# eight frames and 64 pointers; the others belong to self-attention.
VARIANTS = [(80, 64, 0.1), (80, 64, 0.0), (80, 256, 0.1), (90, 64, 0.1), (90, 256, 0.1)]
KERNELS = ["forward", "query_gradient", "key_gradient"]
OTHERS = ["rotate", "combine", "row"]
STACK = {
    ("key_gradient", 90, 64): 128,
    ("query_gradient", 80, 64): 64,
    ("forward", 80, 256): 768,
    ("query_gradient", 80, 256): 384,
    ("combine", 80, 256): 16,
}
"""Bytes of a thread in local memory, most of them spilled registers. On an H100 blocks without any were slower; for an
A100 none was found."""
FIRST_FACTOR = "0x7feb352d"
"""Of the hash that draws what is dropped."""

PROGRAM = """
import json, re, sys
import torch
from sam2fast_kernels.aot import compile_launch
from sam2fast_kernels.memory_attention import triton as kernels

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def report(launch, capability):
    compiled = compile_launch(launch, capability)
    sizes = {name: launch.arguments.get(name, 0) for name in ("QUERIES", "KEYS", "DV")}
    print(json.dumps(compiled._asdict() | sizes | {
        "sass": "", "products": len(re.findall(r"\\bHG?MMA", compiled.sass)), "hash": sys.argv[2] in compiled.sass,
    }), flush=True)

for capability, dv, dropout in json.loads(sys.argv[1]):
    keys = 8 * 4096 + 64 if dv == 64 else 4096
    table = empty(4096, 128, dtype=torch.float32)
    inputs = empty(3, 4096, 256), empty(3, keys, 256), empty(3, keys, dv), table, table, keys % 4096, dropout
    seed = empty(dtype=torch.int64)
    rotate, _, forward, combine = kernels.forward_launches(*inputs, seed, capability=capability)
    outputs = [combine.arguments[name] for name in ("out", "row_sum", "lse")]
    upstream = torch.empty_like(outputs[0]), torch.empty_like(outputs[1])
    _, _, row, of_queries, of_keys, *_ = kernels.gradient_launches(
        *upstream, *outputs, *inputs, seed, capability=capability
    )
    for launch in (forward, of_queries, of_keys, rotate, combine, row):
        report(launch, capability)
"""


@pytest.fixture(scope="module")
def compiled():
    """By (variant, kernel). In a process of its own, since this one may interpret Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(VARIANTS), FIRST_FACTOR]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = [(variant, name) for variant in VARIANTS for name in (*KERNELS, *OTHERS)]
    return dict(zip(keys, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", KERNELS + OTHERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_registers_and_shared_memory_suffice(variant, name, compiled):
    kernel = compiled[variant, name]
    assert kernel["stack"] <= STACK.get((name, variant[0], variant[1]), 0)
    assert kernel["shared"] <= SHARED_MEMORY[variant[0]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_run_on_tensor_cores(variant, name, compiled):
    assert compiled[variant, name]["products"] >= 16


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_warp_repeats_the_work_of_another(variant, name, compiled):
    """One exponential for a score; four products for a score, one for a rescaled output."""
    kernel = compiled[variant, name]
    scores = kernel["QUERIES"] * kernel["KEYS"] // kernel["threads"]
    outputs = kernel["QUERIES"] * kernel["DV"] // kernel["threads"] if name == "forward" else 0
    loop = kernel["loop"]
    assert scores <= loop["MUFU.EX2"] <= scores + (8 if name == "forward" else 0)
    assert loop["FMUL"] + loop["FFMA"] <= 4 * scores + outputs


@pytest.mark.parametrize("name", ["forward", "row"])
def test_without_dropout_nothing_is_hashed(name, compiled):
    assert {variant[2] > 0: compiled[variant, name]["hash"] for variant in VARIANTS} == {True: True, False: False}
