"""Run-length masks: equal to pycocotools, equal between back ends, and never out of bounds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from sam2fast_kernels import library
from sam2fast_kernels.rle import RleError, decode, reference
from sam2fast_kernels.rle.op import rle_decode

SHAPES = [(1, 1), (1, 7), (9, 1), (13, 5), (64, 64), (37, 111)]

needs_cpp = pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
OPERATORS = [pytest.param(run, id=backend) for backend, run in rle_decode.overloads.items()]
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]


def official(counts: list, size: tuple[int, int]) -> torch.Tensor:
    """What pycocotools makes of the same counts, as bool [N, H, W]."""
    entries = [{"size": list(size), "counts": item} for item in counts]
    return torch.from_numpy(np.ascontiguousarray(coco.decode(entries).transpose(2, 0, 1))).bool()


def encode(masks: torch.Tensor) -> list[bytes]:
    pixels = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
    return [entry["counts"] for entry in coco.encode(pixels)]


def run_lengths(mask: torch.Tensor) -> list[int]:
    """Run lengths down the columns, the first of them background."""
    pixels = [0, *mask.t().flatten().long().tolist()]
    changes = [i for i in range(1, len(pixels)) if pixels[i] != pixels[i - 1]]
    ends = [change - 1 for change in changes] + [len(pixels) - 1]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def random_masks(size: tuple[int, int], seed: int) -> torch.Tensor:
    """Empty, full, noise, blocks, and single pixels in the corners."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(3, *size, generator=generator) < torch.tensor([0.03, 0.5, 0.97]).view(3, 1, 1)
    blocks = torch.zeros(4, *size, dtype=torch.bool)
    blocks[0, size[0] // 3 :, : size[1] // 2 + 1] = True
    blocks[1, 0, 0] = blocks[2, -1, -1] = True
    blocks[3, :, size[1] // 2] = True
    return torch.cat([torch.zeros(1, *size, dtype=torch.bool), torch.ones(1, *size, dtype=torch.bool), noise, blocks])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SHAPES)
def test_random_masks_survive_a_round_trip(size, backend, poison_empty):
    masks = random_masks(size, seed=sum(size))
    assert torch.equal(decode(encode(masks), size, backend), masks)
    assert torch.equal(decode([text.decode() for text in encode(masks)], size, backend), masks)
    assert torch.equal(decode([run_lengths(mask) for mask in masks], size, backend), masks)


def test_compress_writes_what_pycocotools_writes():
    masks = random_masks((37, 111), seed=0)
    assert [reference.compress(run_lengths(mask)) for mask in masks] == encode(masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_every_length(backend):
    """Runs of 1 to 2^21, rising and falling, so that differences of both signs and all lengths occur."""
    runs = [0] + [2**k for k in range(21)] + [2**k + 1 for k in range(20, -1, -1)]
    size = (sum(runs), 1)
    assert torch.equal(decode([runs], size, backend), official([reference.compress(runs)], size))


@pytest.mark.parametrize("kind", ["manual", "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_masklets_equal_pycocotools(shared_data: Path, kind, backend):
    content = json.loads((shared_data / "sav" / f"sav_000001_{kind}.json").read_text())
    entries = [entry for frame in content["masklet"][::10] for entry in frame if entry["counts"]]
    size = tuple(entries[0]["size"])
    counts = [entry["counts"] for entry in entries]
    masks = decode(counts, size, backend)
    assert masks.any() and torch.equal(masks, official(counts, size))


def test_no_masks_and_size_order():
    assert decode([], (3, 4)).shape == (0, 3, 4)
    assert decode([[1, 1, 4]], (3, 2)).tolist() == [[[False, False], [True, False], [False, False]]]


FAULTS = [
    ([b"\x20"], "mask 0: run 0 of its counts has a character"),
    ([b"p"], "mask 0: run 0 of its counts has a character"),
    (["5\u20ac"], "mask 0: counts have the character"),
    ([[12], b"1P"], "mask 1: its counts end inside run 1"),
    ([b"P" * 13], "mask 0: run 0 of its counts has more than 12 characters"),
    ([[2**70]], "mask 0: run 0 of its counts has more than 12 characters"),
    ([[3, -1, 10]], "mask 0: run 1 of its counts is negative"),
    ([[12], [12], [5, 8]], "mask 2: run 1 of its counts goes beyond the 4 x 3 pixels"),
    ([[2**58]], "mask 0: run 0 of its counts goes beyond"),
    ([[5, 6]], r"mask 0: its counts cover 11 of the 4 x 3 = 12 pixels"),
    ([b""], "mask 0: its counts cover 0 of"),
    ([[12], None], "mask 1: counts must be bytes, str or a list of whole numbers, not None"),
    ([[1.5, 10.5]], "mask 0: counts must be"),
    ([12], "mask 0: counts must be"),
    ("<", "one entry per mask, not a single str"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts, message", FAULTS, ids=range(len(FAULTS)))
def test_faulty_counts_are_named(counts, message, backend):
    with pytest.raises(RleError, match=message):
        decode(counts, (4, 3), backend)


@pytest.mark.parametrize("size", [(0, 3), (4, -3), (2**31, 1), (4,), (4, 3, 1), 12, ("4", "3"), (4.0, 3.0)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(RleError, match="size must be"):
        decode([[12]], size)


@needs_cpp
def test_back_ends_agree_on_corrupt_counts(poison_empty):
    """Cut, changed and random bytes: same masks, same fault, same place."""
    rng = random.Random(0)
    size = (23, 17)
    texts = []
    for text in encode(random_masks(size, seed=1)) * 60:
        damaged = bytearray(text)
        for _ in range(rng.randint(0, 3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.choice([rng.randrange(256), rng.randrange(48, 112)])
        texts.append(bytes(damaged[: rng.randint(0, len(damaged))] if rng.random() < 0.3 else damaged))
    texts += [bytes(rng.randrange(48, 112) for _ in range(rng.randint(0, 30))) for _ in range(500)]
    texts += [bytes(rng.randrange(80, 112) for _ in range(rng.randint(8, 16))) + b"0" for _ in range(50)]
    offsets = torch.tensor([0, *np.cumsum([len(text) for text in texts])])
    stream = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)

    masks, status = rle_decode.overloads["cpp"](stream, offsets, *size)
    expected_masks, expected_status = reference.decode(stream, offsets, *size)
    assert torch.equal(status, expected_status)
    assert torch.equal(masks, expected_masks)
    assert set(status[:, 0].tolist()) == set(map(int, reference.Fault))
    assert not masks[status[:, 0] != 0].any()


@pytest.mark.parametrize("run", OPERATORS)
@pytest.mark.parametrize("offsets", [[0, 4], [0, 2], [1, 3], [0, 2, 1, 3], [-1, 3], [0, 2**62, 3], []])
def test_offsets_cannot_leave_the_counts(run, offsets):
    with pytest.raises(RuntimeError, match="offsets must rise from 0"):
        run(torch.full((3,), 49, dtype=torch.uint8), torch.tensor(offsets, dtype=torch.int64), 2, 2)


@pytest.mark.parametrize("run", OPERATORS)
def test_wrong_types_are_refused(run):
    counts, offsets = torch.full((1,), 52, dtype=torch.uint8), torch.tensor([0, 1])
    assert run(counts, offsets, 2, 2)[1].tolist() == [[0, 0]]
    for bad in (
        (counts.int(), offsets, 2, 2),
        (counts, offsets.int(), 2, 2),
        (counts[None], offsets, 2, 2),
        (counts, offsets, 0, 2),
        (counts, offsets, 2, 2**31),
    ):
        with pytest.raises(RuntimeError, match="rle_decode: "):
            run(*bad)


@needs_cpp
def test_strided_input():
    masks = random_masks((13, 5), seed=3)
    stream, offsets = b"".join(encode(masks)), torch.tensor([0, *np.cumsum([len(text) for text in encode(masks)])])
    spread = torch.frombuffer(bytearray(stream), dtype=torch.uint8).repeat_interleave(2)[::2]
    assert not spread.is_contiguous()
    assert torch.equal(rle_decode.overloads["cpp"](spread, offsets.repeat_interleave(3)[::3], 13, 5)[0], masks)


@needs_cpp
def test_threads_do_not_change_the_result():
    masks = random_masks((64, 64), seed=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(decode(encode(masks) * 8, (64, 64), "cpp"), masks.repeat(8, 1, 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_passes_opcheck_and_compiles(operator):
    masks = random_masks((13, 5), seed=5)
    texts = encode(masks)
    stream = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    offsets = torch.tensor([0, *np.cumsum([len(text) for text in texts])])
    torch.library.opcheck(operator, (stream, offsets, 13, 5))

    compiled = torch.compile(lambda *args: operator(*args)[0].sum((1, 2)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(stream, offsets, 13, 5), masks.sum((1, 2)))


FORKED = """
import torch
from sam2fast_kernels.rle import decode

class Masks(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, n):
        return decode([[4]] * 8, (2, 2)).sum()

torch.set_num_threads(2)
assert Masks()[0] == 0
loader = torch.utils.data.DataLoader(Masks(), num_workers=1, multiprocessing_context="fork")
print(len(list(loader)))
"""


@needs_cpp
def test_forked_data_loader_worker_does_not_hang():
    """A parent that has started OpenMP threads forks a worker, which decodes too."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2"], done.stderr
