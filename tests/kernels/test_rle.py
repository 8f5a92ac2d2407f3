"""Run-length masks: equal to pycocotools, equal between back ends; resampling is exact bilinear interpolation.

That the native code never leaves a buffer: test_rle_fuzz.py. The Triton kernels: test_rle_triton.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from sam2fast_kernels import library, pack_masks
from sam2fast_kernels.rle import RleError, decode, parse, reference
from sam2fast_kernels.rle.op import rle_decode, rle_parse, rle_resample

SHAPES = [(1, 1), (1, 7), (9, 1), (13, 5), (64, 64), (37, 111)]

needs_cpp = pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
PARSERS = [pytest.param(run, id=backend) for backend, run in rle_parse.overloads.items()]
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
    assert torch.equal(decode(encode(masks), size, backend, packed=True), pack_masks(masks))


def test_compress_writes_what_pycocotools_writes():
    masks = random_masks((37, 111), seed=0)
    assert [reference.compress(run_lengths(mask)) for mask in masks] == encode(masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_every_length(backend):
    """Runs of 1 to 2^21, rising and falling, so that differences of both signs and all lengths occur."""
    runs = [0] + [2**k for k in range(21)] + [2**k + 1 for k in range(20, -1, -1)]
    size = (sum(runs), 1)
    assert torch.equal(decode([runs], size, backend), official([reference.compress(runs)], size))


def real_masks(folder: Path) -> dict[tuple[int, int], list]:
    """Counts by (H, W): all masklets of SA-V, all masks of SA-1B, crowd regions of COCO (not compressed)."""
    masklets = [json.loads((folder / "sav" / f"sav_000001_{kind}.json").read_text()) for kind in ("manual", "auto")]
    entries = [entry for content in masklets for frame in content["masklet"] for entry in frame or () if entry]
    for path in sorted((folder / "sa1b").glob("*.json")):
        entries += [annotation["segmentation"] for annotation in json.loads(path.read_text())["annotations"]]
    crowds = json.loads((folder / "coco_mini_val2017" / "instances.json").read_text())["annotations"]
    entries += [annotation["segmentation"] for annotation in crowds if annotation["iscrowd"]]
    by_size: dict[tuple[int, int], list] = {}
    for entry in entries:
        by_size.setdefault(tuple(entry["size"]), []).append(entry["counts"])
    return by_size


@needs_cpp
def test_all_real_masks_equal_pycocotools(shared_data):
    kinds = set()
    for size, counts in real_masks(shared_data).items():
        for first in range(0, len(counts), 16):
            some = counts[first : first + 16]
            kinds |= set(map(type, some))
            # pycocotools decodes only compressed counts; those of lists are compressed by its own function.
            entries = [{"size": size, "counts": item} for item in some]
            entries = [coco.frPyObjects(e, *size) if isinstance(e["counts"], list) else e for e in entries]
            official = coco.decode(entries).transpose(2, 0, 1)
            runs = parse(some, size, "cpp").check()
            assert np.array_equal(runs.decode().numpy(), official)
            bits = runs.decode(packed=True).numpy()
            assert np.array_equal(np.unpackbits(bits, axis=2, count=size[1], bitorder="little"), official)
            assert runs.areas.tolist() == coco.area(entries).tolist()
    assert kinds == {str, list}


def test_no_masks_and_size_order():
    assert decode([], (3, 4)).shape == (0, 3, 4) and decode([], (3, 9), packed=True).shape == (0, 3, 2)
    assert decode([[1, 1, 4]], (3, 2)).tolist() == [[[False, False], [True, False], [False, False]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_areas_and_faults_without_drawing(backend):
    """Texts and lists mixed, a fault among them: the others are measured, and drawn in the order that is asked for."""
    masks = random_masks((13, 5), seed=6)[2:6]
    counts = [run_lengths(masks[0]), encode(masks)[1], b"1P", run_lengths(masks[2]), None, encode(masks)[3]]
    runs = parse(counts, (13, 5), backend)
    areas = masks.sum((1, 2)).tolist()
    assert runs.areas.tolist() == [areas[0], areas[1], 0, areas[2], 0, areas[3]] and len(runs) == 6
    assert list(runs.faults) == [4, 2] and "end inside run 1" in runs.faults[2] and "not None" in runs.faults[4]
    with pytest.raises(RleError, match="mask 2: its counts end inside"):
        runs.check()
    assert torch.equal(runs.decode(backend=backend)[[0, 1, 3, 5]], masks) and not runs.decode()[[2, 4]].any()
    some = runs.select([5, 2, 0])
    assert torch.equal(some.decode(backend=backend)[[0, 2]], masks[[3, 0]]) and list(some.faults) == [1]
    assert len(runs.select([])) == 0 and runs.select([]).decode(backend=backend).shape == (0, 13, 5)


def random_place(size: tuple[int, int], rng: random.Random) -> tuple:
    """Source, target, side and flip."""

    def part(length: int) -> slice:
        start = rng.randrange(length) if rng.random() < 0.7 else 0
        return slice(start, rng.randint(start + 1, length) if rng.random() < 0.7 else length)

    side = rng.randint(1, 70)
    return (part(size[0]), part(size[1])), (part(side), part(side)), side, rng.random() < 0.5


@needs_cpp
def test_resampling_equals_the_reference(poison_empty):
    """Noise, so that rows change everywhere, and blocks; parts of one pixel, enlarged and reduced, with ties."""
    rng = random.Random(0)
    for seed in range(50):
        size = (rng.randint(1, 40), rng.randint(1, 40))
        runs = parse(encode(random_masks(size, seed)), size)
        place = random_place(size, rng)
        expected = runs.resample(*place, backend="reference")
        assert torch.equal(runs.resample(*place, backend="cpp"), expected), (size, place)
        assert torch.equal(runs.resample(*place, packed=True, backend="cpp"), pack_masks(expected))
        assert torch.equal(runs.resample(*place, packed=True, backend="reference"), pack_masks(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_resampling_is_bilinear_interpolation(backend):
    """Of the part alone, as torch.nn.functional.interpolate does it; pixels within rounding of a half do not count."""
    rng = random.Random(1)
    for seed in range(20):
        size = (rng.randint(2, 60), rng.randint(2, 60))
        masks = random_masks(size, seed)
        source, target, side, flip = random_place(size, rng)
        to = tuple(part.stop - part.start for part in target)
        share = torch.zeros(len(masks), side, side, dtype=torch.float64)
        share[:, *target] = torch.nn.functional.interpolate(
            masks[None, :, *source].double(), to, mode="bilinear", align_corners=False
        )[0]
        share = share.flip(2) if flip else share
        found = parse(encode(masks), size).resample(source, target, side, flip, backend=backend)
        assert ((found == (share >= 0.5)) | ((share - 0.5).abs() < 1e-9)).all()


def test_ties_are_foreground():
    assert parse([[1, 1]], (2, 1)).resample((slice(0, 2), slice(0, 1)), (slice(0, 1), slice(0, 1)), 1).all()


@pytest.mark.parametrize(
    "place, message",
    [
        (((slice(0, 5), slice(0, 3)), (slice(0, 4), slice(0, 4)), 4), "0 <= start < stop <= 4, not slice"),
        (((slice(2, 2), slice(0, 3)), (slice(0, 4), slice(0, 4)), 4), "0 <= start < stop <= 4, not slice"),
        (((slice(0, 4), slice(0, 3)), (slice(0, 4), slice(-1, 4)), 4), "0 <= start < stop <= 4, not slice"),
        (((slice(0, 4), slice(None)), (slice(0, 4), slice(0, 4)), 4), "0 <= start < stop <= 3, not slice"),
        (((slice(0, 4), slice(0, 3)), (slice(0, 4), slice(0, 4)), 0), "1 to 32768 pixels, not 0"),
        (((slice(0, 4), slice(0, 3)), (slice(0, 4), slice(0, 4)), 2**15 + 1), "1 to 32768 pixels, not 32769"),
    ],
)
def test_impossible_places_are_refused(place, message):
    with pytest.raises(ValueError, match=message):
        parse([[12]], (4, 3)).resample(*place)


FAULTS = [
    ([b"\x20"], "mask 0: run 0 of its counts has a character"),
    ([b"p"], "mask 0: run 0 of its counts has a character"),
    (["5\u20ac"], "mask 0: counts have the character"),
    ([[12], b"1P"], "mask 1: its counts end inside run 1"),
    ([b"P" * 13], "mask 0: run 0 of its counts has more than 12 characters"),
    ([[2**70]], "mask 0: run 0 of its counts goes beyond"),
    ([[3, -(2**70)]], "mask 0: run 1 of its counts is negative"),
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
    stream, offsets = joined(texts)
    outputs, expected = rle_parse.overloads["cpp"](stream, offsets, *size), reference.parse(stream, offsets, *size)
    for output, want in zip(outputs, expected, strict=True):
        assert torch.equal(output, want)
    ends, lengths, areas, status = outputs
    assert set(status[:, 0].tolist()) == set(map(int, reference.Fault))
    masks = rle_decode.overloads["cpp"](ends, offsets[:-1], lengths, *size, False)
    assert torch.equal(masks.sum((1, 2)), areas)
    assert not masks[status[:, 0] != 0].any()


@pytest.mark.parametrize("run", PARSERS)
@pytest.mark.parametrize("offsets", [[0, 4], [0, 2], [1, 3], [0, 2, 1, 3], [-1, 3], [0, 2**62, 3], []])
def test_offsets_cannot_leave_the_counts(run, offsets):
    with pytest.raises(RuntimeError, match="offsets must rise from 0"):
        run(torch.full((3,), 49, dtype=torch.uint8), torch.tensor(offsets, dtype=torch.int64), 2, 2)


CHECKED = [
    pytest.param(operator.overloads[backend], place, id=f"{operator.name}-{backend}")
    for operator, place in ((rle_decode, ()), (rle_resample, (0, 4, 0, 3, 0, 5, 0, 5, 5, False)))
    for backend in operator.overloads
    if backend != "triton"  # it does not wait for the device to look at them
]
"""Operators that draw masks of 4 x 3, and where."""


@pytest.mark.parametrize("run, place", CHECKED)
@pytest.mark.parametrize(
    "ends, start, length, message",
    [
        ([3, 12], 0, 3, "runs of mask 1 leave the 2 ends"),
        ([3, 12], 2**62, 2, "runs of mask 1 leave"),
        ([3, 12], -1, 2, "runs of mask 1 leave"),
        ([3, 12], 0, -1, "runs of mask 1 leave"),
        ([3, 11], 0, 2, "ends of mask 1 do not rise to the number of its pixels"),
        ([3, 13], 0, 2, "ends of mask 1 do not rise"),
        ([-1, 12], 0, 2, "ends of mask 1 do not rise"),
        ([9, 3, 12], 0, 3, "ends of mask 1 do not rise"),
    ],
)
def test_ends_cannot_leave_the_mask(run, place, ends, start, length, message):
    ends, starts, lengths = torch.tensor(ends), torch.tensor([0, start]), torch.tensor([0, length])
    with pytest.raises(RuntimeError, match=message):
        run(ends, starts, lengths, 4, 3, *place, False)


@pytest.mark.parametrize("run", PARSERS)
def test_wrong_types_are_refused(run):
    counts, offsets = torch.full((1,), 52, dtype=torch.uint8), torch.tensor([0, 1])
    assert run(counts, offsets, 2, 2)[3].tolist() == [[0, 0]]
    for bad in (
        (counts.int(), offsets, 2, 2),
        (counts, offsets.int(), 2, 2),
        (counts[None], offsets, 2, 2),
        (counts, offsets, 0, 2),
        (counts, offsets, 2, 2**31),
    ):
        with pytest.raises(RuntimeError, match="rle_parse: "):
            run(*bad)


@pytest.mark.parametrize("run, place", CHECKED)
def test_wrong_types_of_ends_are_refused(run, place):
    ends = one = torch.tensor([12])
    zero = torch.tensor([0])
    for bad in ((ends.int(), zero, one), (ends, zero, one[None]), (ends, zero, torch.tensor([1, 1]))):
        with pytest.raises(RuntimeError, match="ends must be int64"):
            run(*bad, 4, 3, *place, False)
    with pytest.raises(RuntimeError, match="height and width must be"):
        run(ends, zero, one, 0, 3, *place, False)


def joined(counts: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts, or lists of run lengths, as the operator takes them."""
    offsets = torch.tensor([0, *np.cumsum([len(entry) for entry in counts])])
    if isinstance(counts[0], bytes):
        return torch.frombuffer(bytearray(b"".join(counts)), dtype=torch.uint8), offsets
    return torch.tensor([run for entry in counts for run in entry]), offsets


@needs_cpp
def test_strided_input():
    masks = random_masks((13, 5), seed=3)
    for counts in (encode(masks), [run_lengths(mask) for mask in masks]):
        stream, offsets = joined(counts)
        spread = stream.repeat_interleave(2)[::2]
        assert not spread.is_contiguous()
        ends, lengths, *_ = rle_parse.overloads["cpp"](spread, offsets.repeat_interleave(3)[::3], 13, 5)
        parts = [tensor.repeat_interleave(2)[::2] for tensor in (ends, offsets[:-1], lengths)]
        assert torch.equal(rle_decode.overloads["cpp"](*parts, 13, 5, False), masks)


@needs_cpp
def test_threads_do_not_change_the_result():
    masks = random_masks((64, 64), seed=4)
    place = (slice(0, 64), slice(0, 64)), (slice(0, 90), slice(0, 99)), 99
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runs = parse(encode(masks) * 8, (64, 64))
        assert torch.equal(runs.decode(backend="cpp"), masks.repeat(8, 1, 1))
        one = parse(encode(masks), (64, 64)).resample(*place, backend="reference")
        assert torch.equal(runs.resample(*place, backend="cpp"), one.repeat(8, 1, 1))
    finally:
        torch.set_num_threads(before)


def operands() -> dict[str, tuple]:
    """Arguments of each operator."""
    stream, offsets = joined(encode(random_masks((13, 5), seed=5)))
    ends, lengths, *_ = reference.parse(stream, offsets, 13, 5)
    runs = (ends, offsets[:-1], lengths, 13, 5)
    place = (1, 12, 0, 5, 0, 9, 2, 10, 10, True, False)
    return {"rle_parse": (stream, offsets, 13, 5), "rle_decode": (*runs, True), "rle_resample": (*runs, *place)}


@pytest.mark.parametrize(
    "operator, backend",
    [(op, backend) for op in (rle_parse, rle_decode, rle_resample) for backend in op.overloads if backend != "triton"],
    ids=lambda value: getattr(value, "name", value),
)
def test_operators_pass_opcheck_and_compile(operator, backend):
    run, arguments = operator.overloads[backend], operands()[operator.name]
    torch.library.opcheck(run, arguments)

    def first_sum(*args):
        result = run(*args)
        return (result if isinstance(result, torch.Tensor) else result[0]).sum()

    compiled = torch.compile(first_sum, fullgraph=True, backend="aot_eager")
    assert compiled(*arguments) == first_sum(*arguments)
