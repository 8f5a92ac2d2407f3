"""What a training step costs: figures that are kept, targets, closed forms; and that the counting itself is right.

Every count runs in a process of its own: a process that has imported torch without a GPU cannot get a fake one.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sam2fast.performance import PerformanceConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GB = 1e9
OFFICIAL_FLOPS = 45.5e12
"""Of the official trainer's step: B+, 8 frames, 3 objects, a mask given in the first frame."""

RUNS = {
    "none": (["base_plus", "large"], ["video"], ["--recompute", "none"]),
    "default": (["tiny"], ["image"], []),
    "points": (["tiny"], ["points"], []),
    "image": (["large"], ["image"], ["--recompute", "none"]),
    "off": (["base_plus"], ["video", "image"], ["--all-off"]),
    "most": (["base_plus", "large"], ["video"], ["--recompute", "decoder+trunk+memory"]),
    "image most": (["large"], ["image"], ["--recompute", "decoder+trunk+memory"]),
}
"""Sizes, batches and options of the processes that count."""
RUNS |= {
    f"no {name}": (["base_plus"], ["video", "image"], ["--off", name, "--recompute", "none"])
    for name in (*PerformanceConfig.model_fields, "fused_loss")
}
ON_DEMAND = RUNS.keys() - {"none", "default"}
"""What only a change to the counting or to timm's trunk can move, and what is far below its target."""
COUNTED = [(run, size, batch) for run, (sizes, batches, _) in RUNS.items() for size in sizes for batch in batches]


def marked(cases: list[tuple]) -> list:
    """Cases, the first entry of which is a run; those on demand are exhaustive."""
    return [pytest.param(*case, marks=[pytest.mark.exhaustive] * (case[0] in ON_DEMAND)) for case in cases]


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "count_step.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="session")
def can_count() -> None:
    done = start("--size", "micro", "--batch", "image", "--side", "64")
    if done.returncode == 2 and ("C++20 compiler" in done.stderr or "sees no GPU" in done.stderr):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["computed"] is True


@pytest.fixture(scope="session")
def counts(can_count):
    """Row of a run, size and batch; the processes start together, two at a time."""

    def count(run: str) -> dict[tuple[str, str], dict]:
        sizes, batches, options = RUNS[run]
        done = start("--size", *sizes, "--batch", *batches, *options, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout.splitlines()[-1])["rows"]
        return {(row["size"], row["batch"]): row for row in rows}

    with ThreadPoolExecutor(2) as pool:
        started: dict[str, Future] = {run: pool.submit(count, run) for run in RUNS if run not in ON_DEMAND}

        def wanted(run: str, size: str, batch: str) -> dict:
            if run not in started:
                started[run] = pool.submit(count, run)
            return started[run].result()[size, batch]

        yield wanted


def flops(row: dict) -> int:
    return row["forward_flops"] + row["backward_flops"]


def peak(row: dict) -> int:
    """Most memory in use, with parameters, gradients, the state of AdamW and the batch."""
    return row["peak_bytes"] + row["state_bytes"]


@pytest.mark.parametrize("run, size, batch", marked(COUNTED))
def test_a_step_costs_no_more_than_it_did(counts, run, size, batch):
    row = counts(run, size, batch)
    with (BENCHMARKS / "results" / "step_counts.csv").open(newline="") as file:
        kept = {
            tuple(known[key] for key in ("size", "batch", "off", "recompute")): known for known in csv.DictReader(file)
        }
    known = kept[size, batch, row["off"], row["recompute"]]
    tolerance = {"forward_flops": 0.005, "backward_flops": 0.005, "state_bytes": 0.0}
    for name in ("forward_flops", "backward_flops", "bytes", "launches", "saved_bytes", "peak_bytes", "state_bytes"):
        assert row[name] == pytest.approx(int(known[name]), rel=tolerance.get(name, 0.02)), (
            f"{name}: if the change is meant, run benchmarks/count_step.py with --save (benchmarks/README.md)"
        )


@pytest.mark.exhaustive
def test_with_everything_off_it_is_the_official_step(counts):
    row = counts("off", "base_plus", "video")
    assert flops(row) == pytest.approx(OFFICIAL_FLOPS, rel=0.01)
    forward = {name: part["forward_flops"] for name, part in row["parts"].items()}
    n, layers, objects = 4096, 4, 3
    # Frame t reads the memories and the pointers (4 tokens each) of t frames.
    cross = sum(4 * n * 256**2 + 4 * m * 64 * 256 + 4 * n * m * 256 for m in (4096 * t + 4 * t for t in range(1, 8)))
    assert forward["memory cross-attention"] == layers * objects * cross
    assert forward["memory self-attention"] == layers * objects * 7 * (8 * n * 256**2 + 4 * n * n * 256)
    assert forward["memory feed-forward"] == layers * objects * 7 * 4 * n * 256 * 2048
    assert forward["trunk"] == pytest.approx(8 * 638.1e9, rel=1e-3)  # an image costs 638.1 GFLOP
    backward = {name: part["backward_flops"] for name, part in row["parts"].items()}
    for name in ("neck", "memory feed-forward"):
        assert backward[name] == pytest.approx(2 * forward[name], rel=0.01)  # products: two gradients each
    # The memory of the last frame is encoded, but nothing reads it.
    assert backward["memory encoder"] == pytest.approx(2 * 7 / 8 * forward["memory encoder"], rel=0.01)


def test_the_optimizations_save_arithmetic(counts):
    assert flops(counts("none", "base_plus", "video")) <= 0.82 * OFFICIAL_FLOPS


@pytest.mark.parametrize(
    "run, size, batch, limit",
    marked(
        [
            ("none", "base_plus", "video", 18),
            ("none", "large", "video", 35),
            ("image", "large", "image", 20),
            ("most", "base_plus", "video", 9),
            ("most", "large", "video", 14),
            ("image most", "large", "image", 10),
        ]
    ),
)
def test_peak_memory_stays_under_its_target(counts, run, size, batch, limit):
    assert peak(counts(run, size, batch)) <= limit * GB


def test_a_switch_off_is_counted(can_count):
    """Values of another width than the keys have no flash attention."""
    done = start("--size", "micro", "--side", "64", "--off", "fused_memory_attention")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "sizes", [["tiny"], pytest.param(["base_plus", "large"], marks=pytest.mark.exhaustive)], ids="-".join
)
def test_with_graphs_the_host_launches_little(can_count, sizes):
    batches = ("video", "points", "image")
    done = start("--size", *sizes, "--batch", *batches, "--graphs", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = {(row["size"], row["batch"]): row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    with (BENCHMARKS / "results" / "graph_counts.csv").open(newline="") as file:
        kept = {(row["size"], row["batch"]): int(row["launches"]) for row in csv.DictReader(file)}
    assert len(kept) == 9 and len(found) == 3 * len(sizes) and max(kept.values()) <= 3000
    assert {key: row["launches"] for key, row in found.items()} == {key: kept[key] for key in found}, (
        "if meant, count with --graphs --save"
    )
    for row in found.values():  # at least inputs and replay, bucketed sums, norm and update of all parameters
        assert row["inputs_replay_terms"] >= 5 and row["all_reduce"] >= 3 and row["clip_and_update"] >= 10


PROGRAM = """
import json
from counting import fake_cuda
fake_cuda.load()
import harness, torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from counting.counter import StepCounter
from counting.parts import PartTracker

def count(make, run):
    tracker = PartTracker()
    counter = StepCounter(tracker)
    with FakeTensorMode(), torch.device("cuda"), torch.autograd.set_multithreading_enabled(False):
        inputs = make(tracker)
        with counter:
            kept = run(*inputs)
    tallies = counter.tallies.values()
    sums = {name: sum(getattr(tally, name) for tally in tallies) for name in ("flops", "bytes", "launches")}
    parts = {}
    for (phase, (part, _)), tally in counter.tallies.items():
        parts[f"{phase} {part}"] = parts.get(f"{phase} {part}", 0) + tally.flops
    return sums | {"peak": counter.at_peak.total(), "live": counter.live.total(), "parts": parts}

def chain(x):
    y = x.view(10, 100).t().exp()
    z = y + 1
    del y
    w = z * 2
    return w.add_(1)

def depthwise(x, weight):
    F.conv2d(x, weight, padding=3, groups=8).sum().backward()

def transposed(x, weight):
    F.conv_transpose2d(x, weight, stride=2).sum().backward()

def lists(large, *small):
    torch._foreach_zero_([large])
    torch._foreach_add_(list(small), list(small))
    torch._foreach_norm(list(small))

def in_place(x, a, b):
    x.addmm_(a, b)
    torch.mm(a, b, out=x)

def modules(tracker):
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    tracker.watch(first, "trunk")
    tracker.watch(second, "loss")
    return first, second, torch.empty(4, 8)

def two_parts(first, second, x):
    second(first(x)).sum().backward()

def recomputed(first, second, x):
    y = checkpoint(lambda x: second(first(x)).sin(), x, use_reentrant=False)
    y.sum().backward()

def empty(*shapes, grad=False):
    return lambda _: [torch.empty(shape, requires_grad=grad) for shape in shapes]

print(json.dumps({
    "chain": count(empty((1000,)), chain),
    "depthwise": count(empty((2, 8, 16, 16), (8, 1, 7, 7), grad=True), depthwise),
    "transposed": count(empty((2, 8, 4, 4), (8, 4, 2, 2), grad=True), transposed),
    "in_place": count(empty((4, 8), (4, 16), (16, 8)), in_place),
    "lists": count(empty((2 * 320 * 65536 + 1,), *[(5,)] * 65), lists),
    "two_parts": count(modules, two_parts),
    "recomputed": count(modules, recomputed),
}))
"""


@pytest.fixture(scope="session")
def small(can_count) -> dict[str, dict]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_views_are_free_and_freed_memory_counts_no_more(small):
    count = small["chain"]
    assert count["launches"] == 4
    assert count["bytes"] == 8 * 4000
    assert count["peak"] == 2 * 4000  # at any time, the input of an operation and its output, not x itself
    assert count["live"] == 4000


def test_gradients_of_grouped_and_transposed_convolutions(small):
    assert small["depthwise"]["flops"] == 3 * 2 * (2 * 8 * 16 * 16) * 7 * 7
    assert small["transposed"]["flops"] == 3 * 2 * (2 * 8 * 4 * 4) * 4 * 2 * 2


def test_products_in_place_count(small):
    assert small["in_place"]["flops"] == 2 * (2 * 4 * 16 * 8)
    a, b, x = 4 * 16, 16 * 8, 4 * 8
    assert small["in_place"]["bytes"] == 4 * ((a + b + 2 * x) + (a + b + x))


def test_lists_of_tensors_launch_once_for_so_many_blocks_or_tensors(small):
    assert small["lists"]["launches"] == 3 + 2 + 2 * 1


def spent(count: dict) -> dict[str, int]:
    return {name: flops for name, flops in count["parts"].items() if flops}


def test_a_gradient_belongs_to_the_part_of_its_forward_operation(small):
    product = 2 * 4 * 8 * 8
    assert spent(small["two_parts"]) == {
        "forward trunk": product,
        "forward loss": product,
        "backward loss": 2 * product,
        "backward trunk": product,  # its input has no gradient
    }


def test_what_is_computed_again_counts_in_the_backward_pass(small):
    product = 2 * 4 * 8 * 8
    assert spent(small["recomputed"]) == {
        "forward trunk": product,
        "forward loss": product,
        "backward loss": 3 * product,
        "backward trunk": 2 * product,
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--off", "speed"], "argument --off: invalid choice: 'speed'"),
        (["--recompute", "everything"], "unknown recompute policy 'everything'"),
    ],
)
def test_a_mistake_is_one_line(can_count, arguments, message):
    done = start(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_without_a_compiler_it_says_what_to_install(can_count, tmp_path):
    done = start(XDG_CACHE_HOME=str(tmp_path), CXX="/nowhere/g++")
    assert done.returncode == 2
    assert done.stderr == (
        "error: the compiler '/nowhere/g++' does not run: [Errno 2] No such file or directory: '/nowhere/g++'; set CXX "
        "to one that does\n"
    )


def test_a_process_that_has_torch_is_refused(can_count, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fake_cuda = importlib.import_module("counting.fake_cuda")
    with pytest.raises(fake_cuda.FakeCudaError, match="torch is imported already"):
        fake_cuda.load()
