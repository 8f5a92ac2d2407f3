"""Thousands of damaged counts through the native code under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import itertools
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from sam2fast_kernels import library
from sam2fast_kernels.rle import parse, reference

CASES = 4000


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Path:
    """csrc/rle.h alone, compiled with sanitizers that end the program at the first fault."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    program = tmp_path_factory.mktemp("rle") / "fuzz"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
    source, include = Path(__file__).with_name("rle_fuzz.cpp"), library.NATIVE_LIBRARY.parent / "csrc"
    command = [compiler, "-std=c++20", "-O1", *sanitizers, f"-I{include}", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "sanitize" in done.stderr + done.stdout or "asan" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return program


def damaged(text: bytes, rng: random.Random) -> bytes:
    """Characters changed, removed, put in or doubled, in and out of range, numbers made long, and the end cut off."""
    text = bytearray(text)
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(len(text) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(text):
            text[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(text):
            del text[place]
        elif kind == 2:
            text.insert(place, rng.choice([rng.randrange(256), rng.randrange(48, 112), rng.randrange(80, 112)]))
        elif kind == 3:
            text[place:place] = bytes(rng.randrange(80, 112) for _ in range(rng.randint(8, 16)))
        else:
            text[place:place] = text[place : place + rng.randint(1, 14)]
    return bytes(text[: rng.randint(0, len(text))] if rng.random() < 0.2 else text)


def records() -> list[tuple[tuple[int, int], bytes]]:
    """Sizes and texts: encoded masks of many and of few runs, most of them damaged, and texts of nothing but chance."""
    rng = random.Random(0)
    result = []
    for number in range(CASES):
        size = rng.randint(1, 40), rng.randint(1, 40)
        pixels = size[0] * size[1]
        cuts = sorted(rng.randint(0, pixels) for _ in range(rng.choice([0, 1, 2, 5, 60])))
        text = reference.compress([b - a for a, b in itertools.pairwise([0, *cuts, pixels])])
        if number % 10 == 9:
            text = bytes(rng.randrange(48, 112) for _ in range(rng.randint(0, 40)))
        result.append((size, damaged(text, rng) if number % 4 else text))
    return result


def test_damaged_counts_never_leave_a_buffer(fuzzer):
    cases = records()
    stream = b"".join(struct.pack("=3q", *size, len(text)) + text for size, text in cases)
    done = subprocess.run([fuzzer], input=stream, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[:2000]
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == CASES
    faults = []
    for (size, text), (fault, detail, area, whole, part) in zip(cases, found, strict=True):
        counts = torch.tensor(list(text), dtype=torch.uint8)
        *_, areas, status = reference.parse(counts, torch.tensor([0, len(text)]), *size)
        assert ([fault, detail], area) == (status[0].tolist(), areas.item()), (size, text)
        assert whole == area and part >= 0 and (fault == 0 or part == 0), (size, text)
        faults.append(fault)
    assert min(faults.count(fault) for fault in reference.Fault) > 30, faults


@pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
def test_damaged_counts_draw_alike_in_both_back_ends():
    """The operators around that code: same faults and texts of faults, same masks, same squares."""
    for number, (size, text) in enumerate(records()[:200]):
        native, plain = parse([text], size, "cpp"), parse([text], size, "reference")
        assert native.faults == plain.faults and native.areas.item() == plain.areas.item()
        assert torch.equal(native.decode(backend="cpp"), plain.decode(backend="reference"))
        place = (slice(number % size[0], size[0]), slice(0, size[1])), (slice(0, 7), slice(number % 9, 9)), 9
        assert torch.equal(native.resample(*place, backend="cpp"), plain.resample(*place, backend="reference"))
